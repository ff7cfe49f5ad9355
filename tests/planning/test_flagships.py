"""The flagship recipes: they fit their GPUs, launch.py takes them, and their twins have all of their keys."""

from __future__ import annotations

from pathlib import Path
from traceback import format_exception

import pytest
from typer.testing import CliRunner

from megatron_parallel_r1.cluster.command import app
from megatron_parallel_r1.config.reader import read_recipe, read_tree
from megatron_parallel_r1.planning.plan import GIB, plan
from tests.engines.twins import FLAGSHIPS, MIXTURES, SHRUNK, Flagship, leaves, rule_of, twin_of

ADDED = (
    "out",
    "path",
)  # what a twin has beside its flagship's keys: where it runs, and the files of its data

flagships = pytest.mark.parametrize("flagship", FLAGSHIPS, ids=lambda each: each.name)
with_mixtures = pytest.mark.parametrize("flagship", (*FLAGSHIPS, *MIXTURES), ids=lambda each: each.name)


@with_mixtures
def test_it_fits_its_gpus(flagship: Flagship) -> None:
    planned = plan(read_recipe(flagship.path, flagship.added), flagship.training_gpus)
    assert planned.fits and not any("would end with" in note for note in planned.notes)
    assert any("colocated servers fit" in note for note in planned.notes) or "one_node" not in flagship.name
    # What a server beside a rank takes; the rank keeps its weights, and both their contexts.
    rollout = planned.recipe.rollout
    server = (rollout.memory_share or 0) * 80 * GIB if rollout.colocated else 0
    for memory in (memory for stage in planned.stages for memory in stage.memories):
        assert memory.total < 80 * GIB
        assert memory.weights + server < 70 * GIB


@with_mixtures
def test_sft_evaluates_where_it_has_no_servers(flagship: Flagship) -> None:
    sft = plan(read_recipe(flagship.path), flagship.training_gpus).stages[0]
    assert sft.evaluation is None or sft.evaluation.total < 80 * GIB


@with_mixtures
def test_launch_would_submit_it(flagship: Flagship, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sbatch", "srun"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for name, value in {"PYTHON": "bash", "LOG_DIR": str(tmp_path), **flagship.site}.items():
        monkeypatch.setenv(name, value)
    words = ("curriculum", str(flagship.path), "--nodes", str(flagship.nodes), "--dry-run")
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, "".join(format_exception(done.exception))
    lines = done.stdout.splitlines()
    stages = read_recipe(flagship.path).stages
    # One job a stage, and the release.
    whole = ("--ntasks-per-node=8", "--gpus-per-node=8", "--exclusive", "--mem=0")
    for line in (f"--nodes={flagship.nodes}", *whole):
        assert lines.count(f"#SBATCH {line}") == len(stages) + 1


@flagships
def test_its_twin_has_every_key(flagship: Flagship, tmp_path: Path) -> None:
    recipe = twin_of(flagship, tmp_path)
    whole, small = dict(leaves(read_tree(flagship.path))), dict(leaves(read_tree(recipe)))
    assert whole.keys() <= small.keys()
    assert {key.rpartition(".")[2] for key in small.keys() - whole.keys()} <= set(ADDED)
    changed = {key for key in whole if whole[key] != small[key]} - {"model.path", "rollout.sync.folder"}
    assert all(rule_of(key) for key in changed), changed
    planned = plan(read_recipe(recipe, flagship.added), world=2)
    assert [stage.stage.name for stage in planned.stages] == ["sft", "rl_easy", "rl_s1", "rl_s2"]


def test_every_rule_shrinks_something() -> None:
    used = {rule_of(key) for flagship in FLAGSHIPS for key, _ in leaves(read_tree(flagship.path))}
    assert used >= set(SHRUNK)


@pytest.mark.parametrize("kind", ["one_node", "servers"])
def test_both_sizes_have_one_twin(kind: str, tmp_path: Path) -> None:
    """So what the twin of one has trained, that of the other has too."""
    four, eight = (
        read_tree(twin_of(flagship, tmp_path)) for flagship in FLAGSHIPS if flagship.name.endswith(kind)
    )
    assert four == eight
