"""The flagship recipes' twins on a CPU with real SGLang servers: SFT, GRPO, probes, evaluations, release."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engines.servers import START_SECONDS, python_of
from tests.engines.twins import FLAGSHIPS, twin_of
from tests.parallel.launch import ENVIRONMENT
from tests.unit.rollout.serving.launched import launched

pytestmark = [pytest.mark.engines, pytest.mark.slow, pytest.mark.xdist_group("twins")]

ROOT = Path(__file__).resolve().parents[2]
STAGES = ["sft", "rl_easy", "rl_s1", "rl_s2"]
# One launch for both: a process takes as long to start as a twin to train.
PROGRAM = """
import sys
from pathlib import Path
from megatron_parallel_r1.config.reader import read_recipe
from megatron_parallel_r1.curriculum.run import run
if __name__ == "__main__":
    for path in sys.argv[1:]:
        run(read_recipe(Path(path)))
"""


def test_the_twins_train(tmp_path: Path) -> None:
    """One with servers beside the ranks, one with servers apart; those of the other size are the same."""
    one_node, servers = (twin_of(flagship, tmp_path / flagship.name) for flagship in FLAGSHIPS[:2])
    urls, apart = tmp_path / "urls", servers.with_name("apart.yaml")
    apart.write_text(f"recipe: {servers}\nrollout: {{engine: sglang, urls_file: {urls}}}\n")
    settings = {"checkpoint": servers.parent / "model", "python": python_of("sglang"), "port": 0}
    settings |= {"device": "cpu", "dtype": "bfloat16", "log_dir": tmp_path, "urls_file": urls}
    with launched(**settings) as supervisor:
        supervisor.next_healthy(START_SECONDS)
        train(tmp_path, apart, one_node)
    for recipe in (apart, one_node):
        check_run(recipe.parent / "runs/twin")


def train(folder: Path, *recipes: Path) -> None:
    """Runs all stages of recipes, one after another, on two ranks."""
    program = folder / "train.py"
    program.write_text(PROGRAM)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        [sys.executable, *launcher, str(program), *map(str, recipes)],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=2 * START_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def check_run(folder: Path) -> None:
    """Checks that every part of a run took place, and that trainer and servers agree as bfloat16 allows."""
    trained = False
    for name in STAGES:
        steps = lines_of(folder / name / "metrics.jsonl")
        assert steps and not any(step["skipped"] for step in steps)
        if name == "sft":
            assert steps[-1]["loss"] < 0.5 * steps[0]["loss"]
            continue
        for step in steps:
            assert step["mismatch_max"] <= step["mismatch_rounding"]
            assert step["sync_difference"] > 0 and step["servers_up"] == 1
            assert step["parallel_ratio"] > 0
            trained |= step["grad_norm"] > 0
    assert trained
    assert [line["stage"] for line in lines_of(folder / "eval.jsonl")] == STAGES
    assert (folder / "release/model.safetensors").is_file()


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]
