"""The run folder, which belongs to one recipe.

<out>/<name>/config.yaml   the recipe, defaults included     stages.json   names of the stages, in order
             seeds.json    all seeds                         eval.jsonl    one record per evaluation
             state.json    the run's id, digests of data     run.lock*     while commands use it
             tokenizer/    with the tags
             <stage>/      metrics.jsonl, evaluations.jsonl, tensorboard/, traces.jsonl, eval_traces.jsonl,
                           checkpoints/ while it runs, model/ once it is finished; of kind distill
                           sampled.jsonl, and at its end traces.parquet, report.md, report.json
             release/      the released checkpoint           report.html
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import yaml

from megatron_parallel_r1.config.deprecated import with_new_keys
from megatron_parallel_r1.config.recipe import Recipe, is_finished
from megatron_parallel_r1.config.stages import Stage
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.run.datasets import EVALUATION, DataDigest
from megatron_parallel_r1.run.lock import is_lock
from megatron_parallel_r1.thought.tokenizer import save_tokenizer
from megatron_parallel_r1.utils.files import write_atomically
from megatron_parallel_r1.utils.jsonl import read_jsonl
from megatron_parallel_r1.utils.seeding import derive_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class RunState:
    """What `state.json` holds.

    Attributes:
        id: distinguishes the run from an earlier one in the same folder; "" in folders of earlier releases.
        data: for each stage, and `EVALUATION`, the digest of its data sets: those that it was trained on if
            it is finished, or else those that the last command read.
    """

    id: str = ""
    data: Mapping[str, DataDigest] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> RunState:
        """Reads the file; an empty state without one.

        Raises:
            UserError: the file is damaged.
        """
        file = folder / STATE
        if not file.is_file():
            return cls()
        try:
            written = json.loads(file.read_text())
            data = {name: DataDigest(**digest) for name, digest in written["data"].items()}
            return cls(written["id"], data)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError(f"{file} is damaged; restore it, or start over with --fresh") from None

    def write(self, folder: Path) -> None:
        write_atomically(folder / STATE, json.dumps(asdict(self), indent=1) + "\n")


def is_resumable(
    recipe: Recipe, folder: Path, fresh: bool, adapt: bool = False, only: Collection[str] | None = None
) -> bool:
    """Returns whether the run resumes from the folder; otherwise it starts at its first step.

    A folder in which nothing has been trained yet accepts any recipe. Stages may be appended to the recipe of
    a folder in which something has.

    Args:
        fresh: start over in any case.
        adapt: accept changed settings, such as a lower learning rate, of stages that are not finished.
        only: names of the stages to run; None: all.

    Raises:
        UserError: the folder is not a run folder, or another recipe trained what it holds.
    """
    if not folder.exists():
        return False
    if folder.is_dir() and all(map(is_lock, folder.iterdir())):
        return False
    written = folder / "config.yaml"
    if not folder.is_dir() or not (written.is_file() and (folder / "stages.json").is_file()):
        raise UserError(f"{folder} exists but is not a run folder; choose another name or out")
    logs = ("*/metrics.jsonl", f"*/{EVALUATIONS}")
    steps = sum(1 for log in logs for file in folder.glob(log) for _ in file.open("rb"))
    saved = any(map(is_finished, folder.iterdir())) or has_checkpoint(folder, "*")
    saved = saved or any(folder.glob(f"*/{SAMPLED}"))
    if fresh or not (saved or steps):
        return False
    then = with_new_keys(yaml.safe_load(written.read_text()), str(written))
    now = yaml.safe_load(recipe.yaml())
    if adapt:
        for index, (old, new) in enumerate(zip(then["stages"], now["stages"], strict=False)):
            if old["name"] == new["name"] and not is_finished(folder / new["name"]):
                then["stages"][index] = new
    difference = _difference(then, now)
    if difference:
        begun = f"{folder} was started with another recipe ({difference})"
        over = "start over with --fresh, choose another name" if only is None else "choose another name"
        if adapt:
            raise UserError(f"{begun}; --adapt changes unfinished stages only: {over}, or undo the change")
        raise UserError(f"{begun}; {over}, or change unfinished stages with --adapt")
    return saved


def as_begun(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe of a resumed run, with the start of new rows that it began with; `mean` in older ones."""
    model = yaml.safe_load((folder / "config.yaml").read_text())["model"]
    begun = {"new_rows": model.get("new_rows", "mean")}
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=begun)})


def check_data(recipe: Recipe, folder: Path, data: Mapping[str, DataDigest], adapt: bool) -> None:
    """Checks that the data of what a resumed run has begun and not finished are those it began with.

    Args:
        data: the digests of now, by stage; `EVALUATION` for that of the evaluation.
        adapt: accept other data.

    Raises:
        UserError: they are not.
    """
    then = RunState.read(folder).data
    done = _done(recipe, folder)
    for name in [name for name in data if name in then and name not in done]:
        begun = bool(past_evaluations(folder)) if name == EVALUATION else has_checkpoint(folder, name)
        if begun and data[name] != then[name] and not adapt:
            where = name if name == EVALUATION else f"stage {name}"
            raise UserError(
                f"{where}: its data have changed since {folder} was started ({then[name].items:,} items "
                f"then, {data[name].items:,} now); restore them, accept the new ones with --adapt, or choose "
                "another name"
            )


def _done(recipe: Recipe, folder: Path) -> set[str]:
    """The finished stages, and `EVALUATION` if all evaluations are done."""
    done = {stage.name for stage in recipe.stages if is_finished(folder / stage.name)}
    evaluated = {record["stage"] for record in past_evaluations(folder)}
    if {stage.name for stage in recipe.trained_stages if stage.evaluate} <= evaluated:
        done.add(EVALUATION)
    return done


def open_run_folder(
    recipe: Recipe,
    folder: Path,
    resume: bool,
    fresh: bool = False,
    data: Mapping[str, DataDigest] = MappingProxyType({}),
    beside: bool = False,
) -> None:
    """Creates the run folder and writes the recipe, the stage names, all seeds and the state to it.

    Args:
        resume: keep what the folder holds; otherwise the run starts at its first step, and each stage cuts
            off its own files.
        fresh: delete what it holds.
        data: digests of the recipe's data sets; a resumed run keeps the former ones of what is finished.
        beside: other commands train stages of the run now; what they have written stays.

    Raises:
        UserError: the folder cannot be written, or other commands train stages of another recipe in it.
    """
    if beside and not resume:
        then = with_new_keys(yaml.safe_load((folder / "config.yaml").read_text()), str(folder))
        difference = _difference(then, yaml.safe_load(recipe.yaml()))
        if fresh or difference:
            why = "--fresh would delete it" if fresh else f"with another recipe ({difference})"
            raise UserError(
                f"{folder} is in use by another stage, {why}; wait for it, or choose another name"
            )
        return
    state = RunState(secrets.token_hex(8))
    if resume:
        state, done = RunState.read(folder), _done(recipe, folder)
        unfinished = {name: digest for name, digest in data.items() if name not in done}
        data = unfinished | {name: digest for name, digest in state.data.items() if name in done}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        derived = ("tokenizer", "servers")
        for path in folder.iterdir() if not resume else ():
            if is_lock(path) or not (fresh or path.name in derived):
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_atomically(folder / "config.yaml", recipe.yaml())
        write_atomically(folder / "stages.json", json.dumps([stage.name for stage in recipe.stages]))
        write_atomically(folder / "seeds.json", json.dumps(all_seeds(recipe), indent=1) + "\n")
        RunState(state.id, dict(data)).write(folder)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror or error}; choose another out") from None


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
    save_tokenizer(tokenizer, work)
    work.rename(folder / "tokenizer")


STATE = "state.json"
# In the folder of a stage that distils: its sampled traces so far, from which it resumes.
SAMPLED = "sampled.jsonl"
# In a stage's folder, a record for each evaluation while it trains.
EVALUATIONS = "evaluations.jsonl"


def steps_done(folder: Path, stage: Stage) -> int:
    """The last step of a stage so far, 0 if none; early stopping can end it before its `steps`."""
    records = read_jsonl(folder / stage.name / "metrics.jsonl", missing_ok=True)
    return max((record["step"] for record in records), default=0)


def has_checkpoint(folder: Path, stage: str) -> bool:
    """Whether a stage of a run, or with "*" any stage, has a checkpoint to resume from."""
    return any(folder.glob(f"{stage}/checkpoints/step_*"))


def past_evaluations(folder: Path) -> list[dict[str, Any]]:
    """The evaluation records so far."""
    return read_jsonl(folder / "eval.jsonl", missing_ok=True)


# Settings that do not affect the trained weights.
HARMLESS = frozenset(
    {
        "collective_timeout_s",
        "keep_last",
        "keep_traces",
        "metrics_port",
        "new_rows",  # kept as it was: `as_begun`
        "out",
        "parallel",
        "rollout",
        "save_every",
        "save_every_minutes",
        "wandb",
    }
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
        for index, (a, b) in enumerate(zip(old, new, strict=False)):
            name = b.get("name", index) if isinstance(b, dict) else index
            if difference := _difference(a, b, f"{where}.{name}"):
                return difference
        return None
    return None if old == new else f"{where}: {old!r} then, {new!r} now"
