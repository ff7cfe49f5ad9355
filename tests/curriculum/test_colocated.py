"""Colocated servers and the trainer take turns with memory, and a server lost at any point costs no finished
step. Fake servers in this process; the real ones: tests/engines/test_colocated.py."""

from __future__ import annotations

import json
import os
import signal
from itertools import groupby
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_parallel_r1.config.recipe import Recipe
from megatron_parallel_r1.curriculum.run import run
from megatron_parallel_r1.errors import ServersLost, Stopped
from tests.curriculum.fake_colocated import Fakes
from tests.curriculum.test_run_folder import assert_equal, recipe_with, saved

pytestmark = pytest.mark.slow
# A reward that an untrained model gets parts of.
SHORT = (
    "thinking.mode=replay",
    "stages.cold_start.steps=2",
    "stages.rl.reward={name: 'tests.slurm.rewards:shorter'}",
)
COLOCATED = "rollout={engine: sglang, servers: 1, colocated: true, patience_s: 1, sync: {transport: tensor}}"
# What a server does in one step, in order.
STEP = ("info", "weights", "pause", "begin", "receive", "end", "kv_cache", "continue", "score", "draw")
SLEEP = ("pause", "release")


def recipe_of(out: Path, *words: str) -> Recipe:
    return recipe_with(out, *SHORT, COLOCATED, *words)


def go(recipe: Recipe, fakes: Fakes) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        fakes.install(patch)
        return run(recipe)[0].folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run by the native engine, which shares nothing and offloads nothing."""
    folder = run(recipe_with(tmp_path_factory.mktemp("whole"), *SHORT))[0].folder
    before, after = (load_file(folder / stage / "model/model.safetensors") for stage in ("cold_start", "rl"))
    assert all(not torch.equal(before[name], after[name]) for name in after)  # else equality proves nothing
    return folder


def test_trainer_and_server_take_turns(tmp_path: Path, whole: Path) -> None:
    fakes = Fakes(1)
    folder = go(recipe_of(tmp_path), fakes)
    each = [call for call, _ in groupby(fakes.calls)]
    # The server starts with all its memory, once the trainer has given up its own.
    first = [call for call in STEP if call not in ("weights", "kv_cache")]
    turn = ["offload", *STEP, *SLEEP, "onload"]
    assert each == ["offload", *first, *SLEEP, "onload", *turn, *turn, "offload"]
    steps = [json.loads(line) for line in (folder / "rl/metrics.jsonl").read_text().splitlines()]
    assert all(step["mismatch_max"] <= 2e-5 and step["sync_difference"] <= 2e-5 for step in steps)
    assert_equal(folder, whole)


def test_servers_sleep_from_one_stage_to_the_next(tmp_path: Path) -> None:
    """The fakes see to it that nothing touches memory that was released."""
    fakes = Fakes(1)
    evaluated = ("stages.cold_start.evaluate=true", "stages.rl.evaluate=true", "stages.rl.steps=1")
    settings = "evaluation={data: {source: embedded, kind: hard}, problems: 2}"
    folder = go(recipe_of(tmp_path, settings, *evaluated), fakes)
    assert len((folder / "eval.jsonl").read_text().splitlines()) == 2
    # Evaluation, the RL stage's only step, evaluation: each begins with sleeping servers but the first.
    assert fakes.calls.count("release") == 3 and fakes.calls.count("weights") == 2
    # Each takes the weights once.
    assert fakes.calls.count("begin") == 3
    # Also that of SFT, whose model keeps its gradients otherwise.
    assert fakes.calls[0] == "offload"


def test_a_stage_is_evaluated_by_its_servers(tmp_path: Path, whole: Path) -> None:
    data = "{data: {source: embedded, kind: easy}, problems: 6}"
    words = [f"stages.{stage}.evaluate_during={{sets: {{easy: {data}}}}}" for stage in ("cold_start", "rl")]
    fakes = Fakes(1)
    folder = go(recipe_of(tmp_path / "servers", *words), fakes)
    native = run(recipe_with(tmp_path / "native", *SHORT, *words))[0].folder
    for stage in ("cold_start", "rl"):
        ours, theirs = (
            [json.loads(line) | {"time_s": 0} for line in (each / stage / "evaluations.jsonl").open()]
            for each in (folder, native)
        )
        assert ours == theirs and len(ours) == 2
    assert_equal(folder, whole)


@pytest.mark.parametrize("point", ["kv_cache", "draw", "release"])
def test_one_of_two_servers_lost_at_any_point_costs_nothing(point: str, tmp_path: Path, whole: Path) -> None:
    fakes = Fakes(2, point, skips=1)
    assert_equal(go(recipe_of(tmp_path, "rollout.servers=2"), fakes), whole)
    assert [server.alive for server in fakes.servers.values()] == [True, False]


def test_the_only_server_lost_in_its_sleep_is_back_in_time(tmp_path: Path, whole: Path) -> None:
    """It has all its memory then, and is not asked to resume any."""
    fakes = Fakes(1, "release", restarts=True)
    assert_equal(go(recipe_of(tmp_path), fakes), whole)
    assert fakes.calls.count("weights") == 1  # after the second step alone


def test_the_last_server_lost_costs_no_finished_step(tmp_path: Path, whole: Path) -> None:
    with pytest.raises(ServersLost, match="fake:0 is gone; the stage's steps through 2 are saved") as lost:
        go(recipe_of(tmp_path), Fakes(1, "kv_cache", skips=1))
    assert lost.value.own  # a SLURM job is requeued
    assert saved(tmp_path / "mini/rl") == ["step_000002"]
    assert_equal(go(recipe_of(tmp_path), Fakes(1)), whole)


def test_a_stop_during_the_hand_over_comes_after_the_step(tmp_path: Path, whole: Path) -> None:
    def stop() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Stopped, match="after step 2, saved"):
        go(recipe_of(tmp_path), Fakes(1, "kv_cache", strike=stop))
    assert_equal(go(recipe_of(tmp_path), Fakes(1)), whole)
