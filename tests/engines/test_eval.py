"""`eval/run.py` on real rollout servers: the loop of the training, on the checkpoint's own server."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from megatron_parallel_r1.data.prompts import TEMPLATES
from megatron_parallel_r1.rollout.settings import Thinking

pytestmark = [pytest.mark.engines, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
THINKING = Thinking(
    mode="replay", paths=3, max_blocks=2, max_path_tokens=12, max_response_tokens=90, reserve_tokens=5
)


def evaluate(folder: Path, url: str, engine: str, out: Path) -> subprocess.CompletedProcess[str]:
    words = ["--checkpoint", folder, "--benchmarks", "embedded_easy", "--limit", 6, "--samples", 2]
    where = ["--engine", engine, "--server", url, "--out", out, "--mode", "parallel"]
    command = [sys.executable, ROOT / "eval" / "run.py", *words, *where]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600)


def with_thinking(folder: Path) -> Path:
    """Adds what a release tells of its decoding; servers do not mind."""
    told = asdict(THINKING) | {"prompt": "plain", "prompt_template": TEMPLATES["plain"]}
    (folder / "thinking.json").write_text(json.dumps(told))
    return folder


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_evaluates_on_a_server(
    tiny_folder: Path, engine: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue(f"{engine}_url")
    folder = with_thinking(tiny_folder)
    done = evaluate(folder, url, engine, tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    files = sorted((tmp_path / "out").glob("records/*/*.jsonl"))
    records = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert len(records) == 12
    assert sum(record["blocks"] for record in records) > 0

    other = shutil.copytree(folder, tmp_path / "other")
    refused = evaluate(other, url, engine, tmp_path / "none")
    assert refused.returncode == 2
    assert "start it with that checkpoint" in refused.stderr
