"""Job specifications: what a job runs, parsed from its command line before anything is started."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from megatron_parallel_r1.config.reader import read_recipe, refuse_single_stage, stage_to_run
from megatron_parallel_r1.config.recipe import Recipe, is_finished
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.evaluation.output import DEFAULT_OUT, records_under

# Kinds that take a recipe, and all.
RECIPE_KINDS = ("sft", "rl", "distill", "curriculum")
# Of jobs that may start rollout servers on nodes of their own.
SAMPLING_KINDS = ("rl", "distill")
KINDS = (*RECIPE_KINDS, "eval", "doctor")


@dataclass(frozen=True, slots=True)
class JobSpec:
    """
    Attributes:
        kind: one of KINDS, the command of `parallel-r1`.
        arguments: of that command.
        recipe: the recipe that the arguments name; None for an evaluation and the doctor, which validate
            their arguments themselves.
        stage: the stage to train; None for all stages.
        folders: where the steps are recorded.
    """

    kind: str
    arguments: tuple[str, ...]
    recipe: Recipe | None
    stage: str | None
    folders: tuple[Path, ...]

    @classmethod
    def read(cls, kind: str, arguments: Sequence[str]) -> JobSpec:
        """
        Raises:
            UserError: `parallel-r1` would reject the arguments, or they do not survive a requeue.
        """
        if kind not in RECIPE_KINDS:
            options = {word.partition("=")[0] for word in arguments}
            if kind == "eval" and not {"--checkpoint", "--benchmarks"} <= options:
                raise UserError("an evaluation needs --checkpoint FOLDER and --benchmarks NAMES, after --")
            records = [evaluation_records(arguments)] if kind == "eval" else []
            return cls(kind, tuple(arguments), None, None, tuple(records))
        parser = _Parser("RECIPE [--stage NAME] [KEY=VALUE]...")
        parser.add_argument("recipe", type=Path)
        parser.add_argument("overrides", nargs="*")
        parser.add_argument("--stage")
        parser.add_argument("--fresh", action="store_true")
        parser.add_argument("--adapt", action="store_true")
        parsed = parser.parse_intermixed_args(list(arguments))
        if parsed.fresh:
            raise UserError("--fresh: a requeued job would start over; delete the run's folder instead")
        recipe = read_recipe(parsed.recipe, parsed.overrides)
        stage: str | None = None
        if kind == "curriculum":
            refuse_single_stage(parsed.recipe)
        else:
            stage = stage_to_run(recipe, parsed.recipe, kind, parsed.stage)
        run = recipe.out / recipe.name
        runs = [run] if recipe.seeds is None else [run / f"seed{seed}" for seed in recipe.seeds]
        folders = tuple(folder / stage if stage else folder for folder in runs)
        return cls(kind, tuple(arguments), recipe, stage, folders)


def evaluation_records(arguments: Sequence[str]) -> Path:
    """Returns the records folder of an evaluation.

    Args:
        arguments: of `eval/run.py`, which validates all but `--out`.

    Raises:
        UserError: `--out` has no value.
    """
    parser = _Parser("--out FOLDER")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    return records_under(parser.parse_known_args(list(arguments))[0].out)


def server_arguments(spec: JobSpec, engine: str) -> list[str]:
    """Returns the arguments of `parallel-r1 serve-rollout` for an RL stage.

    The trainer sends its own weights before the first rollout.

    Raises:
        UserError: as `check_servers_fit`, or there is no checkpoint to start the servers from.
    """
    check_servers_fit(spec, engine)
    assert spec.kind in SAMPLING_KINDS and spec.recipe, "other jobs have no servers"
    (stage,) = (stage for stage in spec.recipe.stages if stage.name == spec.stage)
    recipe, previous = spec.recipe, spec.recipe.start_of(stage)
    run = recipe.out / recipe.name
    folder = recipe.model.folder if previous is None else recipe.start_folder(run, previous) / "model"
    if folder is None:
        raise UserError(f"stage {stage.name} starts from a fresh model, which servers cannot load")
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"stage {stage.name} starts from {folder}, which is missing; run that stage first")
    isolated = engine == "sglang" and recipe.thinking_of(stage).mode == "isolated"
    named = {"--key-variable": recipe.rollout.key_variable, "--key-file": recipe.rollout.key_file}
    key = [f"{option}={value}" for option, value in named.items() if value is not None]
    return ["--checkpoint", str(folder), *(["--isolated"] if isolated else []), *key]


def check_servers_fit(spec: JobSpec, engine: str) -> None:
    """
    Raises:
        UserError: the recipe cannot use the servers that the job starts for it.
    """
    if spec.recipe and spec.recipe.seeds is not None:
        raise UserError("ROLLOUT_NODES: the servers load the weights of one run; set seed, not seeds")
    added = (f"rollout.engine={engine}", "rollout.urls_file=urls")
    try:
        JobSpec.read(spec.kind, (*spec.arguments, *added))
    except UserError as error:
        raise UserError(
            f"{error}; ROLLOUT_NODES adds rollout.engine={engine} and rollout.urls_file to the recipe: adapt "
            "the recipe, or set ROLLOUT_NODES=0"
        ) from None


def sweep_overrides(recipe: Path, overrides: Sequence[str], sweeps: Sequence[str]) -> list[list[str]]:
    """Returns the overrides of each sweep member, with a run name of its own; one empty list without sweeps.

    Args:
        sweeps: KEY=A,B,...; several span their product.

    Raises:
        UserError: a sweep is malformed.
    """
    if not sweeps:
        return [[]]
    axes = []
    for sweep in sweeps:
        key, equals, values = sweep.partition("=")
        if not (key and equals and values):
            raise UserError(f"--sweep {sweep}: write KEY=A,B,... such as seed=1,2,3")
        axes.append([(key, value) for value in values.split(",")])
    name = read_recipe(recipe, overrides).name
    members = []
    for point in itertools.product(*axes):
        suffix = "_".join(f"{key.rpartition('.')[2]}{value}" for key, value in point)
        members.append([*(f"{key}={value}" for key, value in point), f"name={name}_{suffix}"])
    return members


def shared_start(spec: JobSpec) -> list[str]:
    """Returns the override by which all members of a stage's sweep start from what one run has finished.

    Args:
        spec: the stage without the sweep.

    Raises:
        UserError: the stage that it starts from is not finished.
    """
    if spec.recipe is None or spec.stage is None or spec.recipe.start_run is not None:
        return []
    (stage,) = (stage for stage in spec.recipe.stages if stage.name == spec.stage)
    run = spec.recipe.out / spec.recipe.name
    starts = [spec.recipe.start_folder(run, before) for before in spec.recipe.needs_of(stage)]
    for start in starts:
        if not is_finished(start):
            raise UserError(
                f"--sweep: stage {stage.name} starts from {start}, which is not finished; run that stage "
                "first, once for all members"
            )
    return [f"start_run={run}"] if starts else []


def check_sweep(specs: Sequence[JobSpec]) -> None:
    """
    Raises:
        UserError: two members would train the same.
    """
    seen: dict[str, str] = {}
    for spec in specs:
        assert spec.recipe, "only recipes are swept"
        stages = [stage for stage in spec.recipe.stages if spec.stage in (None, stage.name)]
        trained = spec.recipe.model_copy(update={"name": "", "stages": tuple(stages)}).yaml()
        if other := seen.get(trained):
            raise UserError(
                f"--sweep: {other} and {spec.recipe.name} would train the same; give each value once, of a "
                f"key that {f'stage {spec.stage}' if spec.stage else 'the recipe'} depends on"
            )
        seen[trained] = spec.recipe.name


class _Parser(argparse.ArgumentParser):
    """
    Args:
        usage_line: the expected arguments, shown in errors.
    """

    def __init__(self, usage_line: str) -> None:
        super().__init__(add_help=False, allow_abbrev=False)
        self._usage_line = usage_line

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; give {self._usage_line}")
