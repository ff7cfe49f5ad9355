"""Stages that carry the optimizer on, end on a plateau, keep their best checkpoint, and log to a board."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_parallel_r1.config.reader import read_recipe
from megatron_parallel_r1.curriculum.run import run
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.run.stage_loop import StageLoop

RECIPE = Path(__file__).parent / "mini.yaml"


def sft_stages(*settings: str) -> str:
    """The recipe's `stages` as one YAML value: an SFT stage, and the same one once more."""
    data = "data: {source: embedded_cold_start}, examples_per_step: 8"
    plain = f"kind: sft, {data}, save_every: 2, optimizer: {{lr: 1.0e-2}}"
    second = ", ".join(["name: more", plain, "steps: 3", *settings])
    return f"stages=[{{name: cold_start, {plain}, steps: 3}}, {{{second}}}]"


def losses(stage: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (stage / "metrics.jsonl").read_text().splitlines()]


def run_stages(out: Path, *settings: str) -> Path:
    recipe = read_recipe(RECIPE, [sft_stages(*settings), "evaluation=null", f"out={out}"])
    (outcome,) = run(recipe)
    return outcome.folder


@pytest.mark.slow
def test_a_carried_optimizer_goes_on_where_it_was(tmp_path: Path) -> None:
    fresh = run_stages(tmp_path / "fresh")
    carried = run_stages(tmp_path / "carried", "carry_optimizer: true")
    assert losses(fresh / "cold_start") == losses(carried / "cold_start")
    assert losses(fresh / "more")[0] == losses(carried / "more")[0]
    assert losses(fresh / "more")[1:] != losses(carried / "more")[1:]
    assert list((carried / "cold_start/checkpoints").glob("step_*"))
    assert not (fresh / "cold_start/checkpoints").exists()


def test_a_stage_ends_on_a_plateau_and_resumes_as_ended(tmp_path: Path) -> None:
    """Stopped after its last checkpoint and before its model was kept, it has no step to make any more."""
    settings = ("keep_best: true", "early_stopping: {metric: loss, mode: min, window: 1, min_delta: 100}")
    folder = run_stages(tmp_path, *settings)
    assert len(losses(folder / "more")) == 2 and len(losses(folder / "cold_start")) == 3
    before = load_file(folder / "more/model/model.safetensors")
    shutil.rmtree(folder / "more/model")
    again = load_file(run_stages(tmp_path, *settings) / "more/model/model.safetensors")
    assert len(losses(folder / "more")) == 2
    assert all(torch.equal(before[name], again[name]) for name in before)


def test_the_best_checkpoint_outlives_the_stage(tmp_path: Path) -> None:
    # At this rate nothing is learned: how good a step is depends on the examples that it was given.
    more = {"optimizer.lr": 1e-9, "batch": 2, "steps": 6, "save_every": 1}
    still = [f"stages.more.{name}={value}" for name, value in more.items()]
    stages = sft_stages("keep_best: true", "keep_last: 1")
    (outcome,) = run(read_recipe(RECIPE, [stages, *still, "evaluation=null", f"out={tmp_path}"]))
    found = losses(outcome.folder / "more")
    best = found.index(min(found)) + 1
    assert 1 < best < 6
    kept = sorted((outcome.folder / "more/checkpoints").glob("step_*"))
    manifests = [json.loads((path / "manifest.json").read_text()) for path in kept]
    assert [manifest["step"] for manifest in manifests] == [best, 6]
    assert manifests[0]["score"] == pytest.approx(min(found))


def test_weights_and_biases_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    recipe = read_recipe(
        RECIPE, [sft_stages(), "evaluation=null", "wandb={project: x, mode: offline}", f"out={tmp_path}"]
    )
    (outcome,) = run(recipe)
    runs = [path.name for path in (outcome.folder / "wandb").glob("offline-run-*/run-*.wandb")]
    assert len(runs) == 2 and len(set(runs)) == 1  # two stages, one run


def test_the_first_stage_has_no_optimizer_to_carry_on(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stage cold_start: it is the first: there is no optimizer"):
        read_recipe(RECIPE, ["stages.cold_start.carry_optimizer=true", f"out={tmp_path}"])


@pytest.mark.slow
def test_a_renewed_reference_goes_on_where_it_was(tmp_path: Path) -> None:
    """Stopped between two renewals, the run goes on against the same reference: its KL is the same."""
    rl = "stages.rl.objective={kl: k3, kl_coefficient: 0.1}"
    length = "stages.rl.reward={name: length, settings: {limit: 80}}"
    words = [rl, length, "stages.rl.reference_every=2", "stages.rl.save_every=3", "stages.cold_start.steps=3"]
    quick = ["evaluation=null", "stages.cold_start.evaluate=false", "stages.rl.evaluate=false"]

    def kls(out: Path, steps: int) -> list[float]:
        recipe = read_recipe(RECIPE, [*words, *quick, f"stages.rl.steps={steps}", f"out={out}"])
        (outcome,) = run(recipe)
        lines = (outcome.folder / "rl/metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["kl"] for line in lines]

    whole = kls(tmp_path / "whole", 6)
    assert len(whole) == 6 and min(whole) > 1e-4  # two mini-batches: the second is away from the first
    stopped = Stopped(after=4)
    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(StageLoop, "end", stopped.end)
        kls(tmp_path / "stopped", 6)
    assert kls(tmp_path / "stopped", 6) == whole
    assert not (tmp_path / "stopped/mini/rl/reference").exists()


class Stopped:
    """A user who stops the last stage after some step."""

    def __init__(self, after: int) -> None:
        self.after = after
        self.original = StageLoop.end

    @property
    def end(self):
        def end(loop: StageLoop, step: int, *values: object) -> None:
            self.original(loop, step, *values)
            if step == self.after:
                raise KeyboardInterrupt

        return end
