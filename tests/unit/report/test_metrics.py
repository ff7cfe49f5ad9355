"""Metrics on disk: whole lines, no duplicates after a resume, the same numbers for TensorBoard."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.run.stage_log import MetricsWriter
from megatron_parallel_r1.utils.jsonl import JsonlWriter, read_jsonl


def _write(folder: Path, steps: range, resume_step: int, shift: float = 0.0) -> None:
    with MetricsWriter(folder, resume_step=resume_step) as metrics:
        for step in steps:
            metrics.write({"stage": "s", "kind": "sft", "step": step, "steps": 9, "loss": step + shift})


def test_a_line_per_step_is_readable_while_the_writer_is_open(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, resume_step=0) as metrics:
        metrics.write({"kind": "sft", "step": 1, "loss": 2.5})
        assert read_jsonl(tmp_path / "metrics.jsonl") == [{"kind": "sft", "step": 1, "loss": 2.5}]


def test_a_resumed_run_has_no_step_twice(tmp_path: Path) -> None:
    _write(tmp_path, range(1, 7), resume_step=0)
    _write(tmp_path, range(4, 8), resume_step=3, shift=0.5)
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["loss"] for row in rows] == [1, 2, 3, 4.5, 5.5, 6.5, 7.5]
    assert not (tmp_path / "metrics.jsonl.new").exists()


def test_a_fresh_run_starts_an_empty_file(tmp_path: Path) -> None:
    _write(tmp_path, range(1, 4), resume_step=0)
    _write(tmp_path, range(1, 2), resume_step=0)
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1]


def test_tensorboard_shows_the_resumed_curve(tmp_path: Path) -> None:
    _write(tmp_path, range(1, 7), resume_step=0)
    time.sleep(1)  # files are read in the order of their names, which hold the second of their creation
    _write(tmp_path, range(4, 8), resume_step=3, shift=0.5)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    points = {event.step: event.value for event in board.Scalars("sft/loss")}
    assert points == {1: 1, 2: 2, 3: 3, 4: 4.5, 5: 5.5, 6: 6.5, 7: 7.5}
    assert board.Tags()["scalars"] == ["sft/loss"]


def test_numbers_of_all_kinds_become_json(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, resume_step=0) as metrics:
        metrics.write(
            {
                "kind": "rl",
                "step": 1,
                "nan": math.nan,
                "inf": torch.tensor(math.inf),
                "tensor": torch.tensor(0.5),
                "numpy": np.float32(0.25),
                "count": np.int64(3),
                "none": None,
                "name": "accuracy",
            }
        )
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "kind": "rl",
        "step": 1,
        "nan": None,
        "inf": None,
        "tensor": 0.5,
        "numpy": 0.25,
        "count": 3,
        "none": None,
        "name": "accuracy",
    }


def test_a_torn_last_line_is_no_record_and_is_cut_before_more_is_written(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]
    with JsonlWriter(path) as lines:
        lines.write({"step": 3})
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_text_that_is_no_unicode_is_still_written(tmp_path: Path) -> None:
    with JsonlWriter(tmp_path / "t.jsonl") as lines:
        lines.write({"text": "half \ud800 a pair\nand a line"})
    (record,) = read_jsonl(tmp_path / "t.jsonl")
    assert record["text"] == "half ? a pair\nand a line"


@pytest.mark.parametrize("line", ["{not json}", "[1, 2]"])
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(UserError, match=r"m\.jsonl, line 2"):
        read_jsonl(path)


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_jsonl(tmp_path / "m.jsonl")


def test_a_line_without_a_step_stops_a_resume_and_leaves_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"loss": 1}\n')
    with pytest.raises(UserError, match="no step"):
        JsonlWriter(path, through=3)
    assert path.read_text() == '{"loss": 1}\n'
