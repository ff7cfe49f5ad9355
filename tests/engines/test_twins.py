"""The flagship recipes' twins on a CPU with real SGLang servers: SFT, GRPO, probes, evaluations, release."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines.servers import START_SECONDS, python_of
from tests.engines.twins import FLAGSHIPS, Flagship, twin_of
from tests.parallel.launch import ENVIRONMENT
from tests.unit.rollout.serving.launched import launched

pytestmark = [pytest.mark.engines, pytest.mark.slow, pytest.mark.xdist_group("twins")]

ROOT = Path(__file__).resolve().parents[2]
ONE_NODE, SERVERS, *_ = FLAGSHIPS


def train(recipe: Path, *overrides: str) -> Path:
    """Runs all stages on two ranks, as one tensor-parallel group; returns the run's folder."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "megatron_parallel_r1.cli", "curriculum", str(recipe), *overrides],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=2 * START_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return recipe.parent / "runs/twin"


def check_run(folder: Path) -> None:
    """Checks that every part of a run took place, and that trainer and servers agree as bfloat16 allows."""
    for name in ("sft", "rl_easy", "rl_s1", "rl_s2"):
        steps = lines_of(folder / name / "metrics.jsonl")
        assert steps and not any(step["skipped"] for step in steps)
        if name == "sft":
            assert steps[-1]["loss"] < 0.5 * steps[0]["loss"]
            continue
        assert len(steps) == 2 and max(step["grad_norm"] for step in steps) > 0
        for step in steps:
            assert step["mismatch_max"] <= step["mismatch_rounding"]
            assert step["sync_difference"] > 0 and step["servers_up"] == 1
            assert step["parallel_ratio"] > 0
    evaluated = lines_of(folder / "eval.jsonl")
    assert [line["stage"] for line in evaluated] == ["sft", "rl_easy", "rl_s1", "rl_s2"]
    assert (folder / "release/model.safetensors").is_file()


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def twin(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    python_of("sglang")
    flagship: Flagship = request.param
    yield twin_of(flagship, tmp_path)


@pytest.mark.parametrize("twin", [ONE_NODE], indirect=True, ids=lambda each: each.name)
def test_with_servers_beside_the_ranks(twin: Path) -> None:
    check_run(train(twin))


@pytest.mark.parametrize("twin", [SERVERS], indirect=True, ids=lambda each: each.name)
def test_with_servers_apart(twin: Path) -> None:
    model, urls = twin.parent / "model", twin.parent / "urls"
    settings = {"checkpoint": model, "python": python_of("sglang"), "port": 0, "device": "cpu"}
    with launched(**settings, dtype="bfloat16", log_dir=twin.parent, urls_file=urls) as supervisor:
        supervisor.next_healthy(START_SECONDS)
        check_run(train(twin, "rollout.engine=sglang", f"rollout.urls_file={urls}"))
