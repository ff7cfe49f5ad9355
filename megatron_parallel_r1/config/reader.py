"""Reads a recipe from a YAML file and the overrides of a command line.

A file with the key `recipe` has the recipe of another file, except for the keys that it sets itself; with the
key `stage` it stands for one stage of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from megatron_parallel_r1.config.deprecated import RENAMED, new_path, with_new_keys
from megatron_parallel_r1.config.recipe import Recipe
from megatron_parallel_r1.errors import UserError

# The wheel has the recipes inside the package (setup.py), a checkout beside it.
_PACKAGED = Path(__file__).resolve().parents[1] / "recipes"
_CHECKOUT = Path(__file__).resolve().parents[2] / "recipes"


def read_recipe(path: Path, overrides: Sequence[str] = (), trains: bool = True) -> Recipe:
    """Reads a recipe, from a file or a packaged one by name (`tiny/demo`); arguments as `read_tree`.

    Args:
        trains: whether its stages will be trained; if not, decoding settings that only evaluate are valid.

    Raises:
        UserError: as `read_tree`, or a key is unknown, missing or ill-typed.
    """
    return Recipe.read(read_tree(path, overrides, RENAMED), str(path), {"trains": trains})


def read_run_recipe(file: Path) -> Recipe:
    """Reads the `config.yaml` of a run folder, also of one that an earlier release wrote.

    Raises:
        UserError: it is no recipe.
        FileNotFoundError: there is no such file.
    """
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: no valid YAML: {' '.join(str(error).split())}") from None
    return Recipe.read(with_new_keys(tree, str(file)), str(file))


def read_tree(
    path: Path, overrides: Sequence[str] = (), renamed: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The mapping in a YAML file with `key=value` overrides applied.

    Args:
        renamed: old keys that are read under their new names (`config.deprecated`).
        overrides: such as `seed=3` or `stages.cold_start.steps=10`; a list's member is named by its index, or
            by its `name`. Values are YAML.

    Raises:
        UserError: the file is missing or no YAML, or an override names nothing.
    """
    tree = _whole_tree(path)
    renamed = renamed or {}
    tree = with_new_keys(tree, str(path), renamed)
    for override in overrides:
        _override(tree, override, renamed)
    # Values may be mappings with old keys too.
    return with_new_keys(tree, "overrides", renamed)


def stage_to_run(recipe: Recipe, path: Path, kind: str, name: str | None) -> str:
    """The stage of a kind that a command line means.

    Args:
        path: of the recipe's file; if it is that of one stage, it names it.
        name: of the stage, if the command line gives it.

    Raises:
        UserError: the recipe has no such stage, or several and none is named.
    """
    name = name or _mapping(path).get("stage")
    names = [stage.name for stage in recipe.stages if stage.kind == kind]
    known = ", ".join(names) or "none"
    if name is not None and name not in names:
        raise UserError(f"{path}: no {kind} stage is called {name}; it has {known}")
    if name is None and len(names) != 1:
        raise UserError(f"{path}: name one of its {kind} stages with --stage: {known}")
    return name or names[0]


def refuse_single_stage(path: Path) -> None:
    """
    Raises:
        UserError: the file stands for one stage, and all of a recipe are to run.
    """
    tree = _mapping(path)
    if "stage" in tree:
        whole = _base(path, tree)
        raise UserError(
            f"{path} is the stage {tree['stage']} alone; run sft, rl or distill with it, or take {whole}"
        )


def find_recipe(path: Path) -> Path:
    """The file of a recipe: `path`, or else the packaged recipe of that name (`tiny/demo`)."""
    if path.exists() or path.is_absolute():
        return path
    packaged = _PACKAGED if _PACKAGED.is_dir() else _CHECKOUT
    named = packaged / path.with_suffix(".yaml")
    return named if named.is_file() else path


def _whole_tree(path: Path, variants: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a file, with that of the recipe that it names below it.

    Args:
        variants: the files that lead to this one.
    """
    tree = _mapping(path)
    if "recipe" not in tree:
        return tree
    file = find_recipe(path).resolve()
    if file in variants:
        raise UserError(f"{path}: its `recipe` leads back to itself")
    base = _whole_tree(_base(path, tree), (*variants, file))
    changes = {key: value for key, value in tree.items() if key not in ("recipe", "stage")}
    return _merged(base, changes, str(path))


def _base(path: Path, tree: dict[str, Any]) -> Path:
    """The file that another one names as its `recipe`, relative to its own folder."""
    if not {"recipe"} < set(tree) or not isinstance(tree["recipe"], str):
        raise UserError(
            f"{path}: beside `recipe` (a path) a file has `stage` (a name), or the keys that it changes"
        )
    return find_recipe(path).parent / tree["recipe"]


def _merged(here: Any, changes: Any, where: str) -> Any:
    """`here` with changes: mappings key by key, lists by their members' names; anything else is replaced."""
    if not isinstance(changes, dict) or not isinstance(here, dict | list):
        return deepcopy(changes)  # aliases of YAML are one object
    for key, value in changes.items():
        if isinstance(here, list):
            index = _index(here, str(key), where)
            here[index] = _merged(here[index], value, where)
        else:
            here[key] = _merged(here.get(key), value, where)
    return here


def _mapping(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(find_recipe(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror or error}; give the path of a recipe, or a name such as tiny/demo"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys, this is a {type(tree).__name__}")
    return tree


def _override(tree: dict[str, Any], override: str, renamed: Mapping[str, str]) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r}: write key=value, such as stages.rl.steps=10")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"override {override!r}: the value is no valid YAML") from None
    *way, last = new_path(key.split("."), f"override {override}", renamed)
    here: Any = tree
    for part in way:
        here = _step_into(here, part, override)
    if isinstance(here, list):
        here[_index(here, last, f"override {override!r}")] = value
    elif isinstance(here, dict):
        here[last] = value
    else:
        raise UserError(f"override {override!r}: {'.'.join(way)} holds a single value, it has no {last}")


def _step_into(here: Any, part: str, override: str) -> Any:
    if isinstance(here, list):
        return here[_index(here, part, f"override {override!r}")]
    if not isinstance(here, dict):
        raise UserError(f"override {override!r}: there is nothing inside {part}")
    return here.setdefault(part, {})


def _index(items: list[Any], part: str, where: str) -> int:
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(items):
        return int(part)
    known = ", ".join(str(name) for name in names if name) or f"0..{len(items) - 1}"
    raise UserError(f"{where}: no {part} in the list, it has {known}")
