"""A run killed ten times, also in the middle of writing checkpoints, ends bit for bit like one left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.curriculum.test_run import RECIPE, command, run, steps_of

# A checkpoint after every step, and steps enough for ten starts.
STEPS = ("stages.cold_start.steps=60", "stages.rl.steps=40")
WORDS = ("curriculum", str(RECIPE), "name=kills", "evaluation.count=4", *STEPS)
EVERY_STEP = ("stages.cold_start.save_every=1", "stages.rl.save_every=1")
KILLS = [("cold_start", number % 2 == 0) for number in range(5)] + [
    ("rl", number % 2 == 0) for number in range(5)
]


def half_written(checkpoints: Path) -> list[Path]:
    """Folders in which a checkpoint is being written right now."""
    return [path for path in checkpoints.glob(".writing_*") if not (path / "manifest.sha256").exists()]


def last_complete(checkpoints: Path) -> int:
    return max((int(path.name.removeprefix("step_")) for path in checkpoints.glob("step_*")), default=0)


def start_and_kill(out: Path, stage: Path, further: int, delay: float | None) -> None:
    """Runs until some further steps of a stage are done, and then for `delay` seconds; None: until a
    checkpoint is being written."""
    metrics, resumes_from = stage / "metrics.jsonl", last_complete(stage / "checkpoints")
    before = metrics.read_bytes() if metrics.exists() else b""
    process = subprocess.Popen(
        command(out, *WORDS, *EVERY_STEP),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    began = time.monotonic()

    def wait_for(moment: Callable[[], bool]) -> None:
        while not moment():
            assert process.poll() is None and time.monotonic() < began + 200
            time.sleep(0.001)

    # A start first cuts off the steps that it will do again.
    wait_for(lambda: metrics.exists() and metrics.read_bytes() != before)
    wait_for(lambda: max(steps_of(stage), default=0) >= resumes_from + further)
    if delay is not None:
        time.sleep(delay)
    else:
        wait_for(lambda: bool(half_written(stage / "checkpoints")))
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_ten_kills_change_nothing(tmp_path: Path) -> None:
    run(tmp_path / "whole", *WORDS)
    draw, half, resumed = random.Random(11), 0, []
    folder = tmp_path / "killed/kills"
    for number, (name, while_writing) in enumerate(KILLS, start=1):
        delay = None if while_writing else draw.uniform(0, 0.5)
        start_and_kill(tmp_path / "killed", folder / name, draw.randint(1, 4), delay)
        checkpoints = folder / name / "checkpoints"
        complete = last_complete(checkpoints)
        left = half_written(checkpoints)
        half += bool(left)
        resumed.append((name, complete))
        print(
            f"kill {number}: {name}, {max(steps_of(folder / name), default=0)} steps done, "
            + (f"{delay:.3f} s after the last of them" if delay is not None else "at the sight of a write")
            + f"; {len(left)} checkpoint half written; goes on from step {complete}"
        )
    assert half >= 3
    assert resumed == sorted(resumed) and not (folder / "rl/model").exists()

    run(tmp_path / "killed", *WORDS, *EVERY_STEP)
    for name in ("cold_start/model", "rl/model", "release"):
        ours, theirs = (
            load_file(tmp_path / out / "kills" / name / "model.safetensors") for out in ("killed", "whole")
        )
        assert ours.keys() == theirs.keys()
        assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []
    for name in ("cold_start", "rl"):
        assert steps_of(folder / name) == steps_of(tmp_path / "whole/kills" / name)
        assert not (folder / name / "checkpoints").exists()
