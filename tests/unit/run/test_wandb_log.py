"""What Weights & Biases gets of a stage: steps over all stages, distributions, tables of traces."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_parallel_r1.run.wandb_log import STEP, TABLE_ROWS, TRACE_COLUMNS, WandbLog

wandb = pytest.importorskip("wandb", reason="wandb is not installed")
TRACE = {
    "problem": "2 + 3",
    "answer": "5",
    "extracted": "5",
    "correct": True,
    "reward": 1.0,
    "text_parts": [
        {"kind": "text", "text": "Two ways."},
        {"kind": "block", "paths": [{"text": "up"}, {"text": "down"}], "summary": "both"},
        {"kind": "text", "text": "Final Answer: 5"},
    ],
}


class RecordedRun:
    """Stands in for wandb's run object and keeps what it is given."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)


def test_steps_are_counted_over_all_stages_and_traces_come_in_tables() -> None:
    run = RecordedRun()
    log = WandbLog(run, "rl_hard", before=460)
    for step in range(1, TABLE_ROWS // 2 + 2):
        record = {"stage": "rl_hard", "kind": "rl", "step": step, "steps": 60, "reward": 0.5, "kl": None}
        log.log(record, [TRACE, TRACE], {"reward": [0.0, 1.0], "length": [40.0, 60.0]})
    log.flush()
    first = run.logged[0]
    assert first[STEP] == 461 and first["rl/reward"] == 0.5 and first["stage"] == "rl_hard"
    assert "rl/kl" not in first
    assert isinstance(first["rl/length_histogram"], wandb.Histogram)
    tables = [values["traces/rl_hard"] for values in run.logged if "traces/rl_hard" in values]
    assert [len(table.data) for table in tables] == [TABLE_ROWS, 2]
    row = dict(zip(TRACE_COLUMNS, tables[0].data[0], strict=True))
    assert row["step"] == 1 and row["correct"] is True
    assert row["response"] == "Two ways.\n[path 1] up\n[path 2] down\n[summary] both\nFinal Answer: 5"


def test_without_weights_and_biases_nothing_happens() -> None:
    log = WandbLog(None, "rl", before=0)
    log.log({"kind": "rl", "step": 1}, [TRACE])
    log.flush()
