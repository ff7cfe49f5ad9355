"""A run killed five times, also in the middle of writing checkpoints, ends bit for bit like one left alone.

So does one of two processes: first both are killed, surely amid a checkpoint, then one of them at any moment,
which ends the other with the lost one's name and step.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from megatron_parallel_r1.errors import LOST_EXIT_CODE
from megatron_parallel_r1.rollout.launcher.ports import free_port
from tests.curriculum.test_run import RECIPE, command, steps_of

# A checkpoint after every step, and steps enough for all starts.
STEPS = ("stages.cold_start.steps=24", "stages.rl.steps=24")
WORDS = ("curriculum", str(RECIPE), "name=kills", "evaluation.problems=4", *STEPS)
HANGS_S = 900  # what has not come by then never will
EVERY_STEP = ("stages.cold_start.save_every=1", "stages.rl.save_every=1")
# Stage, and whether it is killed while it writes a checkpoint.
KILLS = [("cold_start", True), ("cold_start", False), ("rl", True), ("rl", False), ("rl", True)]


def half_written(checkpoints: Path) -> list[Path]:
    """Folders in which a checkpoint is being written right now."""
    return [path for path in checkpoints.glob(".writing_*") if not (path / "manifest.sha256").exists()]


def last_complete(checkpoints: Path) -> int:
    return max((int(path.name.removeprefix("step_")) for path in checkpoints.glob("step_*")), default=0)


def caught(processes: list[subprocess.Popen[bytes]], stage: Path) -> bool:
    """Whether the processes stand still now, with a checkpoint half written; if not, they run on."""
    if not half_written(stage / "checkpoints"):
        return False
    send(processes, signal.SIGSTOP)
    for process in processes:
        while psutil.Process(process.pid).status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
            time.sleep(0.001)
    if half_written(stage / "checkpoints"):
        return True
    send(processes, signal.SIGCONT)
    return False


def send(processes: list[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for process in processes:
        with suppress(ProcessLookupError):  # it may have ended by itself, which is for the caller to see
            os.killpg(process.pid, number)


def wait_for(processes: list[subprocess.Popen[bytes]], moment: Callable[[], bool]) -> None:
    give_up = time.monotonic() + HANGS_S
    while not moment():
        assert all(process.poll() is None for process in processes) and time.monotonic() < give_up
        time.sleep(0.001)


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
    try:
        # A start first cuts off the steps that it will do again.
        wait_for([process], lambda: metrics.exists() and metrics.read_bytes() != before)
        wait_for([process], lambda: max(steps_of(stage), default=0) >= resumes_from + further)
        if delay is not None:
            time.sleep(delay)
        else:
            wait_for([process], lambda: caught([process], stage))
    finally:
        send([process], signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def run(out: Path, *words: str) -> None:
    done = subprocess.run(command(out, *words), capture_output=True, text=True, timeout=HANGS_S)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_five_kills_change_nothing(tmp_path: Path) -> None:
    run(tmp_path / "whole", *WORDS)
    draw, resumed = random.Random(11), []
    folder = tmp_path / "killed/kills"
    for number, (name, while_writing) in enumerate(KILLS, start=1):
        delay = None if while_writing else draw.uniform(0, 0.5)
        start_and_kill(tmp_path / "killed", folder / name, draw.randint(1, 4), delay)
        checkpoints = folder / name / "checkpoints"
        complete = last_complete(checkpoints)
        left = half_written(checkpoints)
        assert left or not while_writing
        resumed.append((name, complete))
        print(
            f"kill {number}: {name}, {max(steps_of(folder / name), default=0)} steps done, "
            + (f"{delay:.3f} s after the last of them" if delay is not None else "at the sight of a write")
            + f"; {len(left)} checkpoint half written; goes on from step {complete}"
        )
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
    "evaluation.problems=4",
    "parallel.sharded_optimizer=true",
    *PAIR_STEPS,
)

# Killed after the checkpoint of step 2; its last heartbeat may be a second older, which is several steps.
LOST = (
    r"(error: )?rank 0 \(stage rl, step [2-5]\): rank 1 has sent no heartbeat for \d+ s, "
    r"it was last in stage (cold_start|rl), [^;]+; this process ends"
)


def start_pair(out: Path, *words: str) -> list[subprocess.Popen[bytes]]:
    """Rank 0 and rank 1 of a run; each writes what it says to a file beside `out`."""
    port = free_port()
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = []
    for rank in range(2):
        with out.with_name(f"{out.name}.rank{rank}").open("w") as log:
            ranks.append(
                subprocess.Popen(
                    command(out, *PAIR, *words),
                    env={**os.environ, **world, "RANK": str(rank)},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    return ranks


def end_pair(out: Path, *words: str) -> None:
    ranks = start_pair(out, *words)
    try:
        codes = [rank.wait(HANGS_S) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0, 0], [out.with_name(f"{out.name}.rank{rank}").read_text() for rank in range(2)]


def kill_pair(out: Path, stage: Path, step: int) -> None:
    """Runs until a stage's checkpoint of `step` is whole, then kills both amid a later one."""
    ranks = start_pair(out, *EVERY_STEP)
    try:
        wait_for(ranks, lambda: last_complete(stage / "checkpoints") >= step and caught(ranks, stage))
    finally:
        send(ranks, signal.SIGKILL)
    assert [rank.wait() for rank in ranks] == [-signal.SIGKILL] * 2


def lose_one(out: Path, stage: Path, step: int) -> str:
    """Runs until a stage's checkpoint of `step` is whole, then kills rank 1; what rank 0 says of that."""
    ranks = start_pair(out, *EVERY_STEP)
    try:
        wait_for(ranks, lambda: last_complete(stage / "checkpoints") >= step)
        send(ranks[1:], signal.SIGKILL)
        assert ranks[0].wait(120) == LOST_EXIT_CODE
    finally:
        send(ranks, signal.SIGKILL)
    assert ranks[1].wait() == -signal.SIGKILL
    output = out.with_name(f"{out.name}.rank0").read_text().splitlines()
    (line,) = [line for line in output if "rank 1" in line]
    return line


@pytest.mark.slow
def test_two_processes_killed_together_or_one_alone_go_on_bit_for_bit(tmp_path: Path) -> None:
    end_pair(tmp_path / "whole")
    folder = tmp_path / "killed/pair"
    for name, step in (("cold_start", 4), ("rl", 2)):
        if name == "cold_start":
            kill_pair(tmp_path / "killed", folder / name, step)
        else:
            output = lose_one(tmp_path / "killed", folder / name, step)
            assert re.fullmatch(LOST, output), output
            print(output)
        checkpoints = folder / name / "checkpoints"
        left, complete = half_written(checkpoints), last_complete(checkpoints)
        print(f"{name}: {len(left)} checkpoint half written; goes on from step {complete}")
        assert complete >= step and (left or name == "rl")
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
