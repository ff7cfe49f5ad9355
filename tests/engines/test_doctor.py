"""The doctor's trial run with a real SGLang server: trainer, server, probe, rewards, release."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.engines.servers import python_of

pytestmark = [pytest.mark.engines, pytest.mark.slow, pytest.mark.xdist_group("doctor")]


def test_the_trial_run_has_a_real_server(tmp_path: Path) -> None:
    python_of("sglang")  # skips where there is none
    words = ("doctor", "--engine", "sglang", "--out", str(tmp_path / "runs"))
    done = subprocess.run(
        [sys.executable, "-m", "megatron_parallel_r1.cli", *words],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "run with sglang" in done.stdout and "a release in" in done.stdout, done.stdout
    assert done.stdout.splitlines()[-1].startswith("ready")
    assert not list((tmp_path / "runs").iterdir())
