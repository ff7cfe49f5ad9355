"""A disk that is full at the end of a stage: one line, and no half of a model.

Checkpoints: tests/unit/train/test_full_disk.py.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "tests/curriculum/mini.yaml"


@pytest.mark.parametrize(
    ("size", "said"),
    [("100k", "cold_start/model could not be written"), ("12k", "a file could not be written")],
)
def test_what_does_not_fit_is_one_line(size: str, said: str, tmp_path: Path) -> None:
    """A small file system of our own, where the kernel lets us have one."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this kernel gives users no mount namespace")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(tmp_path)]
    train = [sys.executable, "-m", "megatron_parallel_r1.cli", "sft", str(RECIPE), "--stage", "cold_start"]
    train += ["stages.cold_start.steps=2", f"out={tmp_path}"]
    script = f"{shlex.join(mount)}; {shlex.join(train)}; code=$?; ls {tmp_path}/mini/cold_start; exit $code"
    words = ["unshare", "-rm", "sh", "-c", script]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said in line and "No space left" in line and "Traceback" not in done.stderr
    assert "model" not in done.stdout.split()
