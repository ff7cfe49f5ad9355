"""A cold start that is killed again and again ends as one that never was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.unit.coldstart.fake_teacher import Body, FakeTeacher, Reply, chat, fault
from tests.unit.coldstart.written_traces import answer_to, gsm8k_file, settings_tree, trace

RUN = """
import json, sys
from megatron_parallel_r1.coldstart.run import cold_start
from megatron_parallel_r1.coldstart.settings import ColdStart
cold_start(ColdStart.read(json.loads(sys.argv[1]), "test"))
"""
FILES = ("traces.parquet", "report.md", "report.json")


def behave(body: Body, tried: int) -> Reply:
    """By the request alone, but for a first try in seven; slow enough to be killed on the way."""
    seed = body["seed"]
    if tried == 0 and seed % 7 == 0:
        return fault(500)
    right = seed % 3 > 0
    answer = answer_to(body["messages"][0]["content"]) if right else "0.5"
    reply = chat(trace(answer, ((2,), (2, 3))[seed % 2], note=str(seed)))
    return Reply(reply.body, delay_s=0.02)


def start(tree: dict) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, "-c", RUN, json.dumps(tree)], env=environment)


@pytest.mark.slow
def test_kills_leave_no_trace(tmp_path: Path) -> None:
    data = gsm8k_file(tmp_path, 60)
    changes = {"samples": 2, "balance": {"per_problem": 2, "ratio": 1.2}}
    with FakeTeacher(behave).running() as teacher:
        whole = settings_tree(teacher.url, data, tmp_path / "whole") | changes
        assert start(whole).wait(timeout=600) == 0
        answers = (tmp_path / "whole" / "answers.jsonl").read_bytes().count(b"\n")

    killed = tmp_path / "killed"
    with FakeTeacher(behave).running() as teacher:
        tree = settings_tree(teacher.url, data, killed) | changes
        kills = 0
        for goal in (25, 60, 95):
            run = start(tree)
            deadline = time.monotonic() + 120
            while len(teacher.requests) < goal and run.poll() is None and time.monotonic() < deadline:
                time.sleep(0.005)
            run.send_signal(signal.SIGKILL)
            assert run.wait(timeout=20) == -signal.SIGKILL, "it ended before it could be killed"
            kills += 1
            assert not (killed / "traces.parquet").exists()
        torn = killed / "answers.jsonl"
        torn.write_bytes(torn.read_bytes() + b'{"key": "torn')
        assert start(tree).wait(timeout=600) == 0
        successes = len(teacher.requests) - len(
            [1 for _, _, body in teacher.requests if body["seed"] % 7 == 0]
        )

    for name in FILES:
        assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    # A kill loses at most what was under way.
    assert torn.read_bytes().count(b"\n") == answers
    assert successes <= answers + kills * tree["concurrency"]
    keys = [json.loads(line)["key"] for line in torn.read_text().splitlines()]
    assert len(set(keys)) == len(keys), "an answer that was kept was asked for again"
