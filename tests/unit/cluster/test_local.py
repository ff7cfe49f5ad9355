"""`slurm/launch.py` on a machine without SLURM: the same commands run jobs on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from traceback import format_exception

import psutil
import pytest
from typer.testing import CliRunner

from megatron_parallel_r1.cluster.command import app
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.utils.exit import STOP_SIGNALS
from tests.curriculum.test_run import RECIPE, steps_of
from tests.parallel.launch import ENVIRONMENT

REPOSITORY = Path(__file__).resolve().parents[3]
PATIENCE_S = 600.0


def launch(folder: Path, *arguments: str) -> str:
    """Runs launch.py in this process; returns its output."""
    done = CliRunner().invoke(app, arguments, env=environment(folder))
    assert done.exit_code == 0, "".join(format_exception(done.exception))
    return done.stdout


def environment(folder: Path) -> dict[str, str]:
    return {**ENVIRONMENT, "PYTHON": sys.executable, "LOG_DIR": str(folder / "logs")}


def wait_for(folder: Path, condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + PATIENCE_S
    while not condition():
        output = [file.read_text() for file in folder.glob("logs/submitit/*/*_log.out")]
        assert time.monotonic() < give_up, "\n".join(output)
        time.sleep(0.2)


@pytest.mark.slow
def test_a_stopped_curriculum_resumes_by_itself(tmp_path: Path) -> None:
    # The third RL step waits for the stop signal (tests/slurm/rewards.py).
    short = (
        "stages.cold_start.steps=3",
        "stages.rl.steps=6",
        "evaluation.problems=4",
        "stages.rl.save_every=50",
        "stages.rl.reward={name: 'tests.slurm.rewards:shorter'}",
    )
    arguments = ("curriculum", str(RECIPE), *short, f"out={tmp_path}/runs", "--local", "--ranks", "2")
    # The submitting process ends before its job and blocks the signal, which its children inherit.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    output = subprocess.run(
        [sys.executable, "slurm/launch.py", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **environment(tmp_path), "HOLD": "stop"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=500,
        check=True,
    ).stdout
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    job, run = output.split()[0], tmp_path / "runs/mini"
    wait_for(tmp_path, lambda: steps_of(run / "rl") == [1, 2])
    (task,) = psutil.Process(int(job)).children()
    task.send_signal(signal.SIGUSR2)  # as submitit does before its time limit
    attempts = tmp_path / f"logs/mini-{job}/attempts.json"
    wait_for(tmp_path, lambda: json.loads(attempts.read_text())[0]["outcome"] != "running")
    wait_for(tmp_path, lambda: len(json.loads(attempts.read_text())) == 2)
    assert json.loads(attempts.read_text())[0]["outcome"] == "stopped"
    wait_for(tmp_path, lambda: "COMPLETED" in launch(tmp_path, "status"))
    assert steps_of(run / "rl") == list(range(1, 7)) and (run / "release").is_dir()
    assert "rl  step 6/6" in launch(tmp_path, "logs", job)


@pytest.mark.slow
def test_a_failed_stage_ends_the_job_with_its_reason(tmp_path: Path) -> None:
    bad = "stages.cold_start.optimizer.lr=1.0e+30"
    launch(tmp_path, "curriculum", str(RECIPE), bad, f"out={tmp_path}/runs", "--local")
    wait_for(tmp_path, lambda: "FAILED" in launch(tmp_path, "status"))
    shown = launch(tmp_path, "status")
    assert "mini: cold_start ended with exit code 2: error: stage cold_start, step" in shown
    assert not (tmp_path / "runs/mini/rl").exists()


@pytest.mark.slow
def test_the_members_of_a_sweep_run_in_sequence(tmp_path: Path) -> None:
    short = ("stages.cold_start.steps=2", "stages.cold_start.evaluate=false", f"out={tmp_path}/runs")
    output = launch(tmp_path, "submit", "sft", str(RECIPE), *short, "--sweep", "seed=1,2", "--local")
    (job,) = output.splitlines()
    first_command, second_command = job.split(" && ")
    assert first_command.endswith("seed=1 name=mini_seed1") and second_command.endswith("name=mini_seed2")
    wait_for(tmp_path, lambda: "COMPLETED" in launch(tmp_path, "status"))
    first, second = (tmp_path / f"runs/mini_seed{seed}/cold_start" for seed in (1, 2))
    assert steps_of(first) == steps_of(second) == [1, 2]
    begun = (second.parent / "config.yaml").stat().st_mtime
    assert begun > (first / "model/config.json").stat().st_mtime


@pytest.mark.slow
def test_a_cancelled_job_leaves_no_process(tmp_path: Path) -> None:
    output = launch(tmp_path, "submit", "sft", str(RECIPE), f"out={tmp_path}/runs", "--local", "--ranks", "2")
    job, run = output.split()[0], tmp_path / "runs/mini"
    wait_for(tmp_path, lambda: bool(steps_of(run / "cold_start")))
    tree = psutil.Process(int(job)).children(recursive=True)
    assert len(tree) >= 3
    assert launch(tmp_path, "cancel") == f"{job}  cancelled\n"
    wait_for(
        tmp_path, lambda: not any(process.is_running() and process.status() != "zombie" for process in tree)
    )
    assert "CANCELLED" in launch(tmp_path, "status")


def test_a_dry_run_prints_the_command_and_runs_nothing(tmp_path: Path) -> None:
    output = launch(tmp_path, "submit", "rl", str(RECIPE), "seed=5", "--local", "--ranks", "3", "--dry-run")
    assert "3 processes" in output and f"parallel-r1 rl {RECIPE} seed=5" in output
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (("submit", "rl", "qwen3_4b/curriculum", "--stage", "rl_s1"), "parallel-r1 rl {}/curriculum.yaml"),
        (("submit", "rl", "qwen3_4b/rl_s1"), "parallel-r1 rl {}/rl_s1.yaml"),
        (("curriculum", "qwen3_4b/curriculum"), "parallel-r1 curriculum {}/curriculum.yaml"),
    ],
)
def test_a_packaged_recipe_goes_by_its_name(words: tuple[str, ...], command: str, tmp_path: Path) -> None:
    parallel = ("parallel={}", "--local", "--ranks", "1", "--dry-run")
    output = launch(tmp_path, *words, *parallel)
    assert command.format(REPOSITORY / "recipes/qwen3_4b") in output


def test_a_layout_that_does_not_divide_the_processes_is_refused(tmp_path: Path) -> None:
    words = ("submit", "rl", str(RECIPE), "parallel.tensor=2", "--local", "--ranks", "3", "--dry-run")
    done = CliRunner().invoke(app, words, env=environment(tmp_path))
    assert isinstance(done.exception, UserError) and "does not divide the 3 processes" in str(done.exception)
