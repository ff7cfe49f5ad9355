"""The run folder, which belongs to one recipe.

<out>/<name>/config.yaml   the recipe, defaults included     stages.json   names of the stages, in order
             seeds.json    all seeds                         eval.jsonl    one record per evaluation
             tokenizer/    with the tags
             <stage>/      metrics.jsonl, tensorboard/, traces.jsonl, eval_traces.jsonl,
                           checkpoints/ while it runs, model/ once it is finished
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
    """Returns whether the run resumes from the folder; otherwise it starts over and clears the folder.

    A folder in which nothing has been trained yet accepts any recipe. Stages may be appended to the recipe of
    a folder in which something has.

    Args:
        fresh: start over in any case.
        adapt: accept changed settings, such as a lower learning rate, of stages that are not finished.

    Raises:
        UserError: the folder is not a run folder, or another recipe trained what it holds.
    """
    if not folder.exists():
        return False
    written = folder / "config.yaml"
    if not folder.is_dir() or not (written.is_file() and (folder / "stages.json").is_file()):
        raise UserError(f"{folder} exists but is not a run folder; choose another name or out")
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
            f"{folder} was started with another recipe ({difference}); "
            "start over with --fresh, choose another name, or change unfinished stages with --adapt"
        )
    return True


def as_begun(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe of a resumed run, with the start of new rows that it began with; `mean` in older ones."""
    model = yaml.safe_load((folder / "config.yaml").read_text())["model"]
    begun = {"new_rows": model.get("new_rows", "mean")}
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=begun)})


def open_run_folder(recipe: Recipe, folder: Path, resume: bool) -> None:
    """Creates the run folder and writes the recipe, the stage names and all seeds to it.

    Args:
        resume: keep what the folder holds; otherwise it is deleted.

    Raises:
        UserError: the folder cannot be created.
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

    The n-th trace of a step takes the n-th seed of the series of `rollout` and the step
    (`utils/seeding.seed_series`).
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
    """Saves the run's tokenizer atomically."""
    work = folder / ".tokenizer"
    shutil.rmtree(work, ignore_errors=True)
    tokenizer.save_pretrained(work)
    work.rename(folder / "tokenizer")


def steps_done(folder: Path, stage: Stage) -> int:
    """The last step of a stage so far, 0 if none; early stopping can end it before its `steps`."""
    records = read_jsonl(folder / stage.name / "metrics.jsonl", missing_ok=True)
    return max((record["step"] for record in records), default=0)


def past_evaluations(folder: Path) -> list[dict[str, Any]]:
    """The evaluation records so far."""
    return read_jsonl(folder / "eval.jsonl", missing_ok=True)


# Settings that do not affect the trained weights.
HARMLESS = frozenset(
    [
        "out",
        "keep_traces",
        "save_every",
        "keep_last",
        "parallel",
        "rollout",
        "collective_timeout_s",
        "wandb",
        "new_rows",  # kept as it was: `as_begun`
    ]
)


def _difference(old: Any, new: Any, where: str = "") -> str | None:
    """Describes the first relevant key at which two recipes differ; None if they agree."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *(key for key in old if key not in new)]:
            if key in HARMLESS:
                continue
            path = f"{where}.{key}" if where else str(key)
            if difference := _difference(old.get(key), new.get(key), path):
                return difference
        return None
    if isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new) and (where != "stages" or len(new) < len(old)):
            return f"{where}: {len(old)} entries then, {len(new)} now"
        pairs = enumerate(zip(old, new, strict=False))
        return next((f for i, (a, b) in pairs if (f := _difference(a, b, f"{where}.{i}"))), None)
    return None if old == new else f"{where}: {old!r} then, {new!r} now"
