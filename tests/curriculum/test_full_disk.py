"""What a run cannot write, here for a limit of a file's size: one line, and no half of a model.

A disk that is really full, under a checkpoint: tests/unit/train/test_full_disk.py.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "tests/curriculum/mini.yaml"


@pytest.mark.parametrize(
    ("most", "message"),
    [
        (50_000, "cold_start/model could not be written"),
        pytest.param(500, "a file could not be written", marks=pytest.mark.slow),
    ],
)
def test_what_cannot_be_written_is_one_line(most: int, message: str, tmp_path: Path) -> None:
    train = [sys.executable, "-m", "megatron_parallel_r1.cli", "sft", str(RECIPE), "--stage", "cold_start"]
    done = subprocess.run(
        [*train, "stages.cold_start.steps=2", f"out={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)),
    )
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert message in line and "File too large" in line and "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("model"))
