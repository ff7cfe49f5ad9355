"""The folder of a run: made once, for one recipe.

<out>/<name>/config.yaml   the recipe, defaults included     stages.json   names of the stages, in order
             tokenizer/    with the tags                     eval.jsonl    one record an evaluation
             <stage>/      metrics.jsonl, tensorboard/, traces.jsonl, checkpoints/ until it is done, model/
             release/      the released checkpoint           report.html
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from megatron_parallel_r1 import config
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.report.jsonl import read_jsonl


def open_run_folder(recipe: config.Recipe, folder: Path, fresh: bool) -> None:
    """Makes the run's folder, or checks that it belongs to the same recipe.

    A folder in which nothing has been trained yet takes the new recipe.

    Args:
        fresh: delete what an earlier run left.

    Raises:
        UserError: the folder is none of a run, or what it holds was trained by another recipe.
    """
    written = folder / "config.yaml"
    if fresh and folder.exists():
        if not written.is_file():
            raise UserError(
                f"{folder} is no run folder (no config.yaml); it is not deleted, choose another name"
            )
        shutil.rmtree(folder)
    if written.is_file() and any((*folder.glob("*/model"), *folder.glob("*/checkpoints/step_*"))):
        difference = _difference(yaml.safe_load(written.read_text()), yaml.safe_load(recipe.yaml()))
        if difference:
            raise UserError(
                f"{folder} was begun with another recipe ({difference}); "
                "start anew with --fresh, or choose another name"
            )
    folder.mkdir(parents=True, exist_ok=True)
    _write_atomically(folder / "stages.json", json.dumps([stage.name for stage in recipe.stages]))
    _write_atomically(written, recipe.yaml())


def past_evaluations(folder: Path) -> list[dict[str, Any]]:
    """What was evaluated so far."""
    file = folder / "eval.jsonl"
    return read_jsonl(file) if file.is_file() else []


def _difference(old: Any, new: Any, where: str = "") -> str | None:
    """The first key at which two recipes differ, None if none; `out` may differ, a folder can move."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *(key for key in old if key not in new)]:
            if (where, key) == ("", "out"):
                continue
            if found := _difference(old.get(key), new.get(key), f"{where}.{key}" if where else str(key)):
                return found
        return None
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return next((f for i, (a, b) in pairs if (f := _difference(a, b, f"{where}.{i}"))), None)
    return None if old == new else f"{where}: {old!r} then, {new!r} now"


def _write_atomically(path: Path, text: str) -> None:
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text)
    os.replace(fresh, path)
