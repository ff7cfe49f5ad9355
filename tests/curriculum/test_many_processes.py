"""A whole run over several processes: the same training, files written once, wrong layouts refused."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_parallel_r1.config.reader import read_recipe
from megatron_parallel_r1.curriculum.run import run as run_recipe
from megatron_parallel_r1.errors import UserError

RECIPE = Path(__file__).parent / "mini.yaml"
SHORT = ("stages.cold_start.steps=4", "stages.rl.steps=2", "evaluation.problems=6")


def run(out: Path, processes: int, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [*launcher, "-m", "megatron_parallel_r1.cli", *words, f"out={out}"],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )


def metrics(run_folder: Path, stage: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_folder / stage / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    done = run(out, 1, "curriculum", str(RECIPE), *SHORT)
    assert done.returncode == 0, done.stderr
    return out / "mini"


@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        pytest.param(2, "parallel.tensor=2", marks=pytest.mark.slow),
        pytest.param(2, "parallel.sharded_optimizer=true", marks=pytest.mark.slow),
        pytest.param(4, "parallel.tensor=2", marks=pytest.mark.slow),
    ],
)
def test_a_run_over_processes_is_the_run_of_one(
    alone: Path, tmp_path: Path, processes: int, layout: str
) -> None:
    done = run(tmp_path, processes, "curriculum", str(RECIPE), *SHORT, layout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("report   ") == 1
    folder = tmp_path / "mini"
    for name in ("loss", "grad_norm", "entropy"):
        ours, theirs = ([m[name] for m in metrics(f, "cold_start")] for f in (folder, alone))
        assert ours == pytest.approx(theirs, rel=1e-5)
    steps = metrics(folder, "rl")
    assert [step["step"] for step in steps] == [1, 2]
    assert max(step["mismatch_max"] for step in steps) <= 2e-5
    assert "slowest_rank" not in steps[0] and steps[1]["slowest_rank"] in range(processes)
    assert steps[1]["slowest_host"] == platform.node()
    assert steps[1]["time_pass_max_s"] >= steps[1]["time_pass_median_s"] > 0
    # The first step's draws come from the same weights but for rounding, each with its own seed.
    assert steps[0]["tokens"] == metrics(alone, "rl")[0]["tokens"]
    assert len((folder / "eval.jsonl").read_text().splitlines()) == 2
    release = load_file(folder / "release/model.safetensors")
    assert release.keys() == load_file(alone / "release/model.safetensors").keys()


@pytest.mark.slow
def test_sft_runs_over_a_pipeline_and_goes_on_in_another_layout(alone: Path, tmp_path: Path) -> None:
    every = ("stages.cold_start.evaluate=false", "stages.cold_start.save_every=2")
    words = ("sft", str(RECIPE), *every, "stages.cold_start.keep_best=true", *SHORT)
    split = ("parallel.pipeline=2", "parallel.context=2", "parallel.recompute=full")
    done = run(tmp_path, 4, *words, *split)
    assert done.returncode == 0, done.stdout + done.stderr
    stage = tmp_path / "mini/cold_start"
    first = metrics(tmp_path / "mini", "cold_start")

    # As a kill right behind the second step leaves it; a stage that keeps its best keeps its checkpoints.
    shutil.rmtree(stage / "model")
    shutil.rmtree(stage / "checkpoints/step_000004")
    done = run(tmp_path, 1, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    second = metrics(tmp_path / "mini", "cold_start")
    assert [step["step"] for step in second] == [1, 2, 3, 4]
    assert second[:2] == first[:2] and second[2]["time_s"] != first[2]["time_s"]
    theirs = [step["loss"] for step in metrics(alone, "cold_start")]
    for ours in (first, second):
        assert [step["loss"] for step in ours] == pytest.approx(theirs, rel=1e-5)


@pytest.mark.slow
def test_a_sweep_over_seeds_joins_its_processes_once_a_seed(tmp_path: Path) -> None:
    short = ("stages.cold_start.steps=2", "evaluation.problems=6")
    done = run(tmp_path, 2, "sft", str(RECIPE), "seeds=[1,2]", *short)
    assert done.returncode == 0, done.stdout + done.stderr
    folders = [tmp_path / "mini" / name for name in ("seed1", "seed2")]
    losses = [[step["loss"] for step in metrics(folder, "cold_start")] for folder in folders]
    assert [len(seed) for seed in losses] == [2, 2] and losses[0] != losses[1]
    assert all((folder / "cold_start/model/model.safetensors").is_file() for folder in folders)
    assert (tmp_path / "mini/seeds.md").is_file()


@pytest.mark.parametrize(
    ("words", "world", "message"),
    [
        (("parallel.tensor=4",), "4", "tensor 4 does not divide the model's kv_heads 2; set tensor to 2"),
        (("parallel.pipeline=3",), "3", "2 layers cannot be cut into pipeline 3"),
        (("parallel.tensor=2",), "3", "= 2 does not divide the 3 processes; start a multiple of 2"),
        (
            ("parallel.context=2", "max_tokens_per_micro_batch=510"),
            "2",
            "max_tokens_per_micro_batch: 510 is no multiple of 4",
        ),
        (("parallel.pipeline=2",), "2", "native engine: pipeline 2 is not supported"),
        (("parallel.tensor=1", "parallel.sequence=true"), "1", "sequence needs a tensor size of 2"),
        (("parallel.tesnor=2",), "1", "parallel.tesnor: unknown key"),
    ],
)
def test_a_wrong_layout_is_refused_before_any_process_waits_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], world: str, message: str
) -> None:
    claim(monkeypatch.setenv, world)
    with pytest.raises(UserError, match=message):
        run_recipe(read_recipe(RECIPE, [*words, f"out={tmp_path}"]))
    assert not dist.is_initialized() and not list(tmp_path.iterdir())


def test_the_refusal_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    claimed: dict[str, str] = {}
    claim(claimed.__setitem__, "3")
    done = run(tmp_path, 1, "curriculum", str(RECIPE), "parallel.tensor=2", **claimed)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "= 2 does not divide the 3 processes; start a multiple of 2" in done.stderr


def claim(say: Callable[[str, str], None], world: str) -> None:
    """Says that so many processes were launched; nobody is, so whoever waits for them does not return."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", world), ("MASTER_ADDR", "127.0.0.1")):
        say(name, value)
    say("MASTER_PORT", "1")
