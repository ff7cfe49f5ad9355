"""The folder of a run: made once, for one recipe.

<out>/<name>/config.yaml   the recipe, defaults included     stages.json   names of the stages, in order
             seeds.json    of every draw                     eval.jsonl    one record an evaluation
             tokenizer/    with the tags
             <stage>/      metrics.jsonl, tensorboard/, traces.jsonl, eval_traces.jsonl,
                           checkpoints/ until it is done, then model/
             release/      the released checkpoint           report.html
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from megatron_parallel_r1.config.deprecated import with_new_keys
from megatron_parallel_r1.config.recipe import Recipe
from megatron_parallel_r1.config.stages import Stage
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.utils.files import write_atomically
from megatron_parallel_r1.utils.jsonl import read_jsonl
from megatron_parallel_r1.utils.seeding import derive_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def is_resumable(recipe: Recipe, folder: Path, fresh: bool, adapt: bool = False) -> bool:
    """Whether a run goes on with what the folder holds; otherwise it begins, and that is cleared away.

    A folder in which nothing has been trained yet takes any recipe, and further stages may be appended to
    what has been.

    Args:
        fresh: begin anew whatever is there.
        adapt: stages that are not done may differ, say in the rate that they go on with.

    Raises:
        UserError: the folder is none of a run, or what it holds was trained by another recipe.
    """
    if not folder.exists():
        return False
    written = folder / "config.yaml"
    if not folder.is_dir() or not (written.is_file() and (folder / "stages.json").is_file()):
        raise UserError(f"{folder} exists and is no run folder; it is left alone, choose another name or out")
    if fresh or not any((*folder.glob("*/model"), *folder.glob("*/checkpoints/step_*"))):
        return False
    then = with_new_keys(yaml.safe_load(written.read_text()), str(written))
    now = yaml.safe_load(recipe.yaml())
    if adapt:
        for index, (old, new) in enumerate(zip(then["stages"], now["stages"], strict=False)):
            if old["name"] == new["name"] and not (folder / new["name"] / "model").is_dir():
                then["stages"][index] = new
    difference = _difference(then, now)
    if difference:
        raise UserError(
            f"{folder} was begun with another recipe ({difference}); "
            "start anew with --fresh, choose another name, or change unfinished stages with --adapt"
        )
    return True


def open_run_folder(recipe: Recipe, folder: Path, resume: bool) -> None:
    """Makes the run's folder and keeps the recipe in it.

    Args:
        resume: keep what is there; otherwise it is deleted.

    Raises:
        UserError: the folder cannot be made.
    """
    try:
        if folder.exists() and not resume:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror or error}; choose another out") from None
    write_atomically(folder / "config.yaml", recipe.yaml())
    write_atomically(folder / "stages.json", json.dumps([stage.name for stage in recipe.stages]))
    write_atomically(folder / "seeds.json", json.dumps(all_seeds(recipe), indent=1) + "\n")


def all_seeds(recipe: Recipe) -> dict[str, Any]:
    """Returns every seed of a run.

    The n-th trace of a step has the n-th seed of the series that `rollout` and the step give
    (rl/rollout_batch.py).
    """
    return {
        "recipe": recipe.seed,
        "evaluation": derive_seed(recipe.seed, "evaluation"),
        "stages": {
            stage.name: {
                purpose: derive_seed(recipe.seed, stage.name, purpose) for purpose in ("data", "rollout")
            }
            for stage in recipe.stages
        },
    }


def keep_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Saves a run's tokenizer, whole or not at all."""
    work = folder / ".tokenizer"
    shutil.rmtree(work, ignore_errors=True)
    tokenizer.save_pretrained(work)
    work.rename(folder / "tokenizer")


def steps_done(folder: Path, stage: Stage) -> int:
    """The last step that a stage has taken, 0 if none; it may have ended before its `steps`."""
    records = read_jsonl(folder / stage.name / "metrics.jsonl", missing_ok=True)
    return max((record["step"] for record in records), default=0)


def past_evaluations(folder: Path) -> list[dict[str, Any]]:
    """What was evaluated so far."""
    return read_jsonl(folder / "eval.jsonl", missing_ok=True)


# What can change without changing what was trained.
HARMLESS = frozenset(
    ["out", "keep_traces", "save_every", "keep_last", "parallel", "rollout", "collective_timeout_s", "wandb"]
)


def _difference(old: Any, new: Any, where: str = "") -> str | None:
    """The first key at which two recipes differ in earnest, None if none."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *(key for key in old if key not in new)]:
            if key in HARMLESS:
                continue
            if found := _difference(old.get(key), new.get(key), f"{where}.{key}" if where else str(key)):
                return found
        return None
    if isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new) and (where != "stages" or len(new) < len(old)):
            return f"{where}: {len(old)} entries then, {len(new)} now"
        pairs = enumerate(zip(old, new, strict=False))
        return next((f for i, (a, b) in pairs if (f := _difference(a, b, f"{where}.{i}"))), None)
    return None if old == new else f"{where}: {old!r} then, {new!r} now"
