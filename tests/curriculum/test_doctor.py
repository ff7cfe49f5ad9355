"""`parallel-r1 doctor` on two ranks: all checks, a trial run, a verdict, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_two_ranks_are_examined_and_leave_nothing(tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    words = ("doctor", "--engine", "native", "--out", str(tmp_path / "runs"))
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "megatron_parallel_r1.cli", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for line in ("2 ranks on 1 node, gloo", "all ranks see each other's files", "a release in"):
        assert line in done.stdout, done.stdout
    assert done.stdout.splitlines()[-1].startswith("ready")
    assert not list((tmp_path / "runs").iterdir())
