"""A checkpoint that does not fit on the disk leaves those before it as they are, and says so."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = [sys.executable, "-m", "tests.unit.train.full_disk"]


def outcome(command: list[str]) -> dict[str, object]:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check(found: dict[str, object], folder: Path, reason: str) -> None:
    saved = found["saved"]
    failed = folder / f"step_{saved + 1:06d}"
    assert found["error"] == (
        f"checkpoint {failed} could not be written: {reason} (process 0); fix that and run the command "
        "again: it resumes from the previous checkpoint"
    )
    assert found["left"] == [f"step_{step:06d}" for step in range(1, saved + 1)]
    assert found["restored"] == saved and found["same"]


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """KiB that each file of a checkpoint takes."""
    folder = tmp_path_factory.mktemp("enough")
    assert outcome([*SCRIPT, str(folder)])["error"] is None
    return {file.name: -(-file.stat().st_size // 4096) * 4 for file in (folder / "step_000001").iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("fits", ["half the shards", "the shards", "all but the manifest's digest"])
def test_a_full_disk(blocks, tmp_path: Path, fits: str) -> None:
    """A small file system of our own, where the kernel lets us have one."""
    if (
        shutil.which("unshare") is None
        or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode
    ):
        pytest.skip("this kernel gives users no mount namespace")
    second = {
        "half the shards": blocks["__0_0.distcp"] // 2,
        "the shards": blocks["__0_0.distcp"],
        "all but the manifest's digest": sum(blocks.values()) - 4,
    }[fits]
    mount = ["mount", "-t", "tmpfs", "-o", f"size={sum(blocks.values()) + second}k", "tmpfs", str(tmp_path)]
    script = [*SCRIPT, str(tmp_path / "checkpoints")]
    found = outcome(["unshare", "-rm", "sh", "-c", f"{shlex.join(mount)} && exec {shlex.join(script)}"])
    assert found["saved"] == 1
    check(found, tmp_path / "checkpoints", "the disk is full")


@pytest.mark.parametrize("limit", [4096, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 500_000))])
def test_files_that_may_not_grow(tmp_path: Path, limit: int) -> None:
    found = outcome([*SCRIPT, str(tmp_path), str(limit)])
    assert found["saved"] == 1
    check(found, tmp_path, "File too large")
