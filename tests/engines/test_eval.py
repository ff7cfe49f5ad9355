"""`eval/run.py` on real rollout servers: the loop of the training, on the checkpoint's own server."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engines.servers import Shared

pytestmark = [pytest.mark.engines, pytest.mark.slow]

ROOT = Path(__file__).parents[2]


def evaluate(folder: Path, url: str, engine: str, out: Path) -> subprocess.CompletedProcess[str]:
    words = ["--checkpoint", folder, "--benchmarks", "embedded_easy", "--limit", 6, "--samples", 2]
    where = ["--engine", engine, "--server", url, "--out", out, "--mode", "parallel"]
    command = [sys.executable, ROOT / "eval" / "run.py", *words, *where]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600)


@pytest.mark.xdist_group("sglang")
def test_evaluates_on_sglang(sglang_server: Shared, tmp_path: Path) -> None:
    assert_evaluates(sglang_server, "sglang", tmp_path)


@pytest.mark.xdist_group("vllm")
def test_evaluates_on_vllm(vllm_server: Shared, tmp_path: Path) -> None:
    assert_evaluates(vllm_server, "vllm", tmp_path)


def assert_evaluates(server: Shared, engine: str, tmp_path: Path) -> None:
    done = evaluate(server.folder, server.url, engine, tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    files = sorted((tmp_path / "out").glob("records/*/*.jsonl"))
    records = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert len(records) == 12
    assert sum(record["blocks"] for record in records) > 0

    other = shutil.copytree(server.folder, tmp_path / "other")
    refused = evaluate(other, server.url, engine, tmp_path / "none")
    assert refused.returncode == 2
    assert "start it with that checkpoint" in refused.stderr
