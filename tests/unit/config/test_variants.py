"""A file that names another recipe has that recipe, with its own keys in place of the other's."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_parallel_r1.config.reader import read_recipe, read_tree
from megatron_parallel_r1.errors import UserError
from tests.curriculum.test_run import RECIPE


def written(folder: Path, **files: str) -> Path:
    """Writes `NAME.yaml` files below the folder's copy of the mini recipe; returns the last one."""
    (folder / "whole.yaml").write_text(RECIPE.read_text())
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{name}.yaml"


def test_mappings_change_by_key_and_stages_by_name(tmp_path: Path) -> None:
    changes = "name: large\nmodel: {shape: {layers: 4}}\nstages: {rl: {steps: 9, objective: {kl: k3}}}\n"
    found = read_recipe(written(tmp_path, large=f"recipe: whole.yaml\n{changes}"))
    equal = ("name=large", "model.shape.layers=4", "stages.rl.steps=9", "stages.rl.objective={kl: k3}")
    assert found == read_recipe(RECIPE, equal)


def test_variants_of_variants_and_their_stages(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    middle = "recipe: whole.yaml\nseed: 5\nstages: {cold_start: &few {steps: 3}, rl: *few}\n"
    last = "recipe: ../middle.yaml\nseed: 6\n"
    written(tmp_path, middle=middle)
    (tmp_path / "sub/last.yaml").write_text(last)
    (tmp_path / "sub/rl.yaml").write_text("recipe: last.yaml\nstage: rl\n")
    found = read_recipe(tmp_path / "sub/rl.yaml", ["stages.rl.steps=4"])
    assert found.seed == 6 and [stage.steps for stage in found.stages] == [3, 4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "recipe: whole.yaml\nstages: {nope: {steps: 3}}\n",
            r"bad.yaml: no nope in the list, it has cold_start, rl",
        ),
        ("recipe: whole.yaml\nsead: 3\n", "sead"),
        ("recipe: bad.yaml\nseed: 3\n", "bad.yaml: its `recipe` leads back to itself"),
        ("recipe: none.yaml\nseed: 3\n", "none.yaml: No such file"),
        ("recipe: whole.yaml\n", "or the keys that it changes"),
    ],
)
def test_what_it_cannot_change_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as refused:
        read_recipe(written(tmp_path, bad=text))
    assert len(str(refused.value).splitlines()) == 1


def test_aliases_are_not_shared(tmp_path: Path) -> None:
    text = "recipe: whole.yaml\nstages: {cold_start: &few {wandering: {a: 1}}, rl: *few}\n"
    tree = read_tree(written(tmp_path, few=text), ["stages.rl.wandering.a=2"])
    assert [stage["wandering"]["a"] for stage in tree["stages"]] == [1, 2]
