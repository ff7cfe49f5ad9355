"""What `status` says of a job: how far it is, what ended it, what it waits for."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_parallel_r1.cluster import __main__ as bookkeeping
from megatron_parallel_r1.cluster.attempts import SPEC_FILE, JobAttempt, read_attempts, write_attempts
from megatron_parallel_r1.cluster.command import app
from megatron_parallel_r1.cluster.job_progress import job_progress, last_error
from megatron_parallel_r1.cluster.job_registry import RegisteredJob, register_jobs

RECIPE = Path(__file__).parents[2] / "curriculum/mini.yaml"
TRACEBACK = """\
Traceback (most recent call last):
  File "loop.py", line 7, in <module>
    raise ValueError("Error: of a user")
ValueError: first
During handling of the above exception, another exception occurred:
[rank3]: torch.distributed.DistBackendError: NCCL error: unhandled system error
[rank3]:[W1130 ProcessGroupNCCL.cpp:1538] Warning: destroy_process_group() was not called
"""
RL = {"stage": "rl", "kind": "rl", "step": 5, "steps": 8, "tokens": 24_690, "time_draw_s": 2.0}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (TRACEBACK, "torch.distributed.DistBackendError: NCCL error: unhandled system error"),
        (
            "step 3/8\nerror: stage rl: no server is left\nsome warning\n",
            "error: stage rl: no server is left",
        ),
        ("KeyboardInterrupt\n", "KeyboardInterrupt"),
        ("RuntimeError in the middle of a line\nThe last Error: is no exception\n", ""),
        ("", ""),
    ],
)
def test_the_last_error_of_a_log_is_found(text: str, error: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_text(text)
    assert last_error(tmp_path / "log") == error
    assert last_error(tmp_path / "absent") == ""


def test_progress_is_that_of_the_stage_that_was_written_last(tmp_path: Path) -> None:
    assert job_progress([tmp_path]) == ""
    for name, record, age in (
        ("cold_start", {"stage": "cold_start", "step": 9, "steps": 9}, 1),
        ("rl", RL, 2),
    ):
        (tmp_path / name).mkdir()
        file = tmp_path / name / "metrics.jsonl"
        file.write_text(json.dumps({"stage": "x"}) + "\n" + json.dumps(record) + '\n{"stage": "rl", "st')
        os.utime(file, (age, age))
    assert job_progress([tmp_path]) == "rl 5/8, 12,345 tokens/s rollout"
    assert job_progress([tmp_path / "cold_start", tmp_path / "absent"]) == "cold_start 9/9"


def test_a_failure_is_recorded_with_the_own_line_of_its_error(tmp_path: Path) -> None:
    logs = tmp_path / "attempt0"
    logs.mkdir()
    (logs / "srun_rank.log").write_text("srun: error: n1: task 3: Exited with exit code 1\n")
    (logs / "rank_3.log").write_text(TRACEBACK)
    bookkeeping.begin(tmp_path, "sft", [str(RECIPE), f"out={tmp_path}"], max_failures=3, max_stops=10)
    assert bookkeeping.end(tmp_path, logs, "rank", 1, max_failures=3, max_stops=10) == 75
    assert read_attempts(tmp_path)[-1].why == (
        "rank 3 on n1 ended with exit code 1: "
        "torch.distributed.DistBackendError: NCCL error: unhandled system error"
    )


def test_status_shows_progress_errors_and_what_jobs_wait_for(tmp_path: Path) -> None:
    """With a fake `squeue`."""
    logs = tmp_path / "logs"
    chain = [
        RegisteredJob("11", "mini-cold_start", "sft", (), False),
        RegisteredJob("12", "mini-rl", "rl", ("11",), False),
        RegisteredJob("13", "mini-release", "curriculum", ("12", "11"), False),
        RegisteredJob("14", "other", "rl", (), False),
    ]
    register_jobs(logs, chain)
    attempts = [
        JobAttempt("failed", "rank 0 on n1 ended with exit code 1: RuntimeError: bad", 4),
        JobAttempt("running"),
    ]
    (logs / "mini-rl-12").mkdir()
    write_attempts(logs / "mini-rl-12", attempts)
    (tmp_path / "rl").mkdir()
    (tmp_path / "rl/metrics.jsonl").write_text(json.dumps(RL) + "\n")
    (logs / "mini-rl-12" / SPEC_FILE).write_text(json.dumps({"folders": [str(tmp_path / "rl")]}))
    states = ["11|COMPLETED|None", "12|RUNNING|None", "13|PENDING|Dependency"]
    states.append("14|PENDING|ReqNodeNotAvail, UnavailableNodes:n[1-2]")
    (tmp_path / "squeue").write_text(
        "#!/bin/sh\nprintf '%s\\n' " + " ".join(f"'{state}'" for state in states)
    )
    (tmp_path / "squeue").chmod(0o755)
    environment = {"LOG_DIR": str(logs), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    shown = CliRunner().invoke(app, ["status"], env=environment).stdout.splitlines()
    assert [" ".join(line.split()) for line in shown] == [
        "11 mini-cold_start COMPLETED 0 steps",
        "12 mini-rl RUNNING 1 steps rl 5/8, 12,345 tokens/s rollout"
        " last failure: rank 0 on n1 ended with exit code 1: RuntimeError: bad",
        "13 mini-release PENDING 0 steps waits for mini-rl (job 12, RUNNING)",
        "14 other PENDING 0 steps pending: ReqNodeNotAvail, UnavailableNodes:n[1-2]",
    ]
