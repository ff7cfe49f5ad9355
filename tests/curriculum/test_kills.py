"""A run killed ten times, also in the middle of writing checkpoints, ends bit for bit like one left alone.

So does one of two processes, both killed twice: once surely amid a checkpoint, once at any moment.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
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


# Two processes started by hand: a launcher's own are not of its process group, which a kill reaches.
PAIR_STEPS = ("stages.cold_start.steps=10", "stages.rl.steps=5")
PAIR = (
    "curriculum",
    str(RECIPE),
    "name=pair",
    "evaluation.count=4",
    "parallel.sharded_optimizer=true",
    *PAIR_STEPS,
)


def start_pair(out: Path, *words: str) -> list[subprocess.Popen[bytes]]:
    """Rank 0 and rank 1 of a run; each writes what it says to a file beside `out`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = []
    for rank in range(2):
        with out.with_name(f"{out.name}.rank{rank}").open("w") as said:
            ranks.append(
                subprocess.Popen(
                    command(out, *PAIR, *words),
                    env={**os.environ, **world, "RANK": str(rank)},
                    stdout=said,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    return ranks


def send(ranks: list[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for rank in ranks:
        with suppress(ProcessLookupError):  # it may have ended by itself, which is for the caller to see
            os.killpg(rank.pid, number)


def end_pair(out: Path, *words: str) -> None:
    ranks = start_pair(out, *words)
    try:
        codes = [rank.wait(300) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0, 0], [out.with_name(f"{out.name}.rank{rank}").read_text() for rank in range(2)]


def kill_pair(out: Path, stage: Path, step: int, while_writing: bool) -> None:
    """Runs until a stage's checkpoint of `step` is whole, then kills both, on request amid a later one."""
    ranks = start_pair(out, "stages.cold_start.save_every=1", "stages.rl.save_every=1")
    try:
        give_up = time.monotonic() + 200
        while last_complete(stage / "checkpoints") < step or (while_writing and not caught(ranks, stage)):
            assert all(rank.poll() is None for rank in ranks) and time.monotonic() < give_up
            time.sleep(0.001)
    finally:
        send(ranks, signal.SIGKILL)
    assert [rank.wait() for rank in ranks] == [-signal.SIGKILL] * 2


def caught(ranks: list[subprocess.Popen[bytes]], stage: Path) -> bool:
    """Whether both processes stand still now, with a checkpoint half written; if not, they run on."""
    if not half_written(stage / "checkpoints"):
        return False
    send(ranks, signal.SIGSTOP)
    if half_written(stage / "checkpoints"):
        return True
    send(ranks, signal.SIGCONT)
    return False


@pytest.mark.slow
def test_two_processes_killed_together_go_on_bit_for_bit(tmp_path: Path) -> None:
    end_pair(tmp_path / "whole")
    folder = tmp_path / "killed/pair"
    for name, step, while_writing in (("cold_start", 4, True), ("rl", 2, False)):
        kill_pair(tmp_path / "killed", folder / name, step, while_writing)
        checkpoints = folder / name / "checkpoints"
        left, complete = half_written(checkpoints), last_complete(checkpoints)
        print(f"{name}: {len(left)} checkpoint half written; goes on from step {complete}")
        assert complete >= step and (left or not while_writing)
    assert not (folder / "rl/model").exists()

    end_pair(tmp_path / "killed")
    for name in ("cold_start/model", "rl/model", "release"):
        ours, theirs = (
            load_file(tmp_path / out / "pair" / name / "model.safetensors") for out in ("killed", "whole")
        )
        assert ours.keys() == theirs.keys()
        assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []
    for name in ("cold_start", "rl"):
        assert steps_of(folder / name) == steps_of(tmp_path / "whole/pair" / name)
