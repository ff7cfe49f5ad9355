"""A run that is asked to stop by a signal saves at once, and ends bit for bit like one left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from megatron_parallel_r1.errors import STOPPED_EXIT_CODE
from tests.curriculum.test_kills import HANGS_S, end_pair, last_complete, start_pair
from tests.curriculum.test_run import steps_of

# Checkpoints are due never, so that only the signal makes one.
RARE = ("stages.cold_start.save_every=100", "stages.rl.save_every=100", "stages.rl.max_off_policy_steps=1")


def stop_pair(out: Path, stage: Path, step: int, number: signal.Signals, tree: bool) -> tuple[int, str]:
    """Runs until a step of a stage is done, then signals rank 1, or both with all their children.

    Returns:
        After which step the run stopped, and what rank 0 said of it.
    """
    ranks = start_pair(out, *RARE)
    try:
        give_up = time.monotonic() + HANGS_S
        while max(steps_of(stage), default=0) < step:
            assert all(rank.poll() is None for rank in ranks) and time.monotonic() < give_up
            time.sleep(0.005)
        processes = [psutil.Process(rank.pid) for rank in ranks]
        reached = [
            *processes,
            *(child for process in processes for child in process.children(recursive=True)),
        ]
        for process in reached if tree else processes[1:]:
            process.send_signal(number)
        assert [rank.wait(HANGS_S) for rank in ranks] == [STOPPED_EXIT_CODE] * 2, output_of(
            out, 0
        ) + output_of(out, 1)
    finally:
        for rank in ranks:
            rank.kill()
    return max(steps_of(stage)), output_of(out, 0)


def output_of(out: Path, rank: int) -> str:
    return out.with_name(f"{out.name}.rank{rank}").read_text()


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    end_pair(tmp_path / "whole", *RARE)
    folder = tmp_path / "stopped/pair"
    for name, step, number, tree in (
        ("cold_start", 3, signal.SIGUSR1, False),
        ("rl", 1, signal.SIGUSR2, True),
    ):
        last, output = stop_pair(tmp_path / "stopped", folder / name, step, number, tree)
        assert (
            f"stage {name}: stopped by a signal after step {last}, saved; the same command continues it"
            in output
        )
        assert last_complete(folder / name / "checkpoints") == last >= step
        assert not (folder / name / "model").exists()

    end_pair(tmp_path / "stopped", *RARE)
    for name in ("cold_start/model", "rl/model", "release"):
        ours, theirs = (
            load_file(tmp_path / out / "pair" / name / "model.safetensors") for out in ("stopped", "whole")
        )
        assert ours.keys() == theirs.keys()
        assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []


@pytest.mark.parametrize("under_torchrun", [False, True])
def test_a_held_signal_ends_no_child(under_torchrun: bool, tmp_path: Path) -> None:
    """SIGTERM is held under torchrun alone."""
    first, second = ("SIGTERM", "SIGTERM") if under_torchrun else ("SIGUSR1", "SIGUSR2")
    script = (
        "import os, signal, subprocess, sys\n"
        "from megatron_parallel_r1.utils.exit import block_stop_signals, stop_signal_pending\n"
        "block_stop_signals()\n"
        "assert not stop_signal_pending()\n"
        f"os.kill(os.getpid(), signal.{first})\n"
        "assert stop_signal_pending()\n"
        f"child = 'import os, signal; os.kill(os.getpid(), signal.{second}); print(\"alive\")'\n"
        "print(subprocess.run([sys.executable, '-c', child], capture_output=True, text=True).stdout)\n"
    )
    launcher = {"TORCHELASTIC_RUN_ID": "1"} if under_torchrun else {}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={**os.environ, **launcher},
    )
    assert done.stdout.strip() == "alive", done.stderr


def test_without_torchrun_a_sigterm_ends_a_run(tmp_path: Path) -> None:
    script = (
        "import os, signal\n"
        "from megatron_parallel_r1.utils.exit import block_stop_signals\n"
        "block_stop_signals()\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], timeout=120, cwd=tmp_path)
    assert done.returncode == -signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_interrupt_ends_a_run_at_once(number: signal.Signals) -> None:
    """Whatever its main thread does; a forked child has neither handler."""
    script = (
        "import os, signal, time\n"
        "from megatron_parallel_r1.utils.exit import stop_signal_pending\n"
        "from megatron_parallel_r1.utils.interrupts import interrupts_recorded\n"
        "with interrupts_recorded():\n"
        "    if not os.fork():\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    assert os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGTERM\n"
        "    assert not stop_signal_pending()\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "    while not stop_signal_pending(): time.sleep(0.01)\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "    time.sleep(600)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 128 + number, done.stderr
    assert done.stderr.count("a second one ends it at once") == 1
