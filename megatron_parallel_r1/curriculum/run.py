"""A run from its recipe to the report. Started again, it goes on where it was."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_parallel_r1.config.recipe import Recipe
from megatron_parallel_r1.config.stages import RlStage, SftStage
from megatron_parallel_r1.curriculum.evaluation import evaluate_stage
from megatron_parallel_r1.curriculum.model_card import Point, thinking_json
from megatron_parallel_r1.curriculum.release import write_release
from megatron_parallel_r1.distributed import process
from megatron_parallel_r1.distributed.collectives import barrier
from megatron_parallel_r1.distributed.watchdog import Watchdog
from megatron_parallel_r1.model.gpt import Model
from megatron_parallel_r1.report.evaluation_table import accuracy_text, evaluation_table, seed_table
from megatron_parallel_r1.report.html import build_report
from megatron_parallel_r1.rewards.verifier import Verifier
from megatron_parallel_r1.rl.loop import train_rl
from megatron_parallel_r1.run.backends import Backends
from megatron_parallel_r1.run.context import RunContext
from megatron_parallel_r1.run.datasets import check_sources, contamination_report
from megatron_parallel_r1.run.folder import is_resumable, keep_tokenizer, open_run_folder, past_evaluations
from megatron_parallel_r1.run.save import save_model
from megatron_parallel_r1.run.stage_loop import checkpoint_folder
from megatron_parallel_r1.run.wandb_log import check_wandb
from megatron_parallel_r1.sft.loop import train_sft
from megatron_parallel_r1.utils.rank import is_rank_zero


def open_console() -> Console:
    """A console as wide as the terminal, or 160 columns in a log; quiet on ranks other than zero."""
    console = Console(quiet=not is_rank_zero())
    return console if console.is_terminal else Console(width=160, quiet=console.quiet)


@dataclass(frozen=True, slots=True)
class RunResult:
    """Where a run left its results; `release` is None for a run of single stages."""

    folder: Path
    report: Path
    release: Path | None
    evaluations: list[dict[str, Any]]


def run(
    recipe: Recipe,
    only: Collection[str] | None = None,
    fresh: bool = False,
    adapt: bool = False,
    console: Console | None = None,
) -> list[RunResult]:
    """Runs a recipe, once for each of its seeds; those side by side go to `<out>/<name>/seeds.md`.

    Args:
        only: names of the stages to run; None: all of them, and the release.
        fresh: delete what an earlier run left in the folder.
        adapt: go on though stages that are not done are set otherwise than when the run began.

    Raises:
        UserError: a file or setting is wrong; what earlier stages made stays.
    """
    console = console or open_console()
    if recipe.seeds is None:
        return [_run_seed(recipe, recipe.out / recipe.name, only, fresh, adapt, console)]
    outcomes = []
    for seed in recipe.seeds:
        console.rule(f"seed {seed}")
        single = recipe.model_copy(update={"seed": seed, "seeds": None})
        folder = recipe.out / recipe.name / f"seed{seed}"
        outcomes.append(_run_seed(single, folder, only, fresh, adapt, console))
    by_seed = {seed: done.evaluations for seed, done in zip(recipe.seeds, outcomes, strict=True)}
    table = seed_table(by_seed)
    if is_rank_zero():
        (recipe.out / recipe.name / "seeds.md").write_text(table + "\n")
    console.print(table, highlight=False, markup=False)
    return outcomes


def _run_seed(
    recipe: Recipe,
    folder: Path,
    only: Collection[str] | None,
    fresh: bool,
    adapt: bool,
    console: Console,
) -> RunResult:
    names = {stage.name for stage in recipe.stages} if only is None else set(only)
    resume = is_resumable(recipe, folder, fresh, adapt)
    check_sources(recipe)
    check_wandb(recipe)
    run = RunContext.set_up(recipe, folder, resume)
    run.check_starts(names)
    run.check_split(names, process.world_size())
    split, patience = recipe.parallel, recipe.collective_timeout_s
    with (
        process.running(recipe.seed, split, patience) as watchdog,
        Verifier(workers=_workers()) as verifier,
        Backends(run) as backends,
    ):
        # Every process has looked at the folder by now; the first one may change it.
        if is_rank_zero():
            open_run_folder(recipe, folder, resume)
            if not resume:
                keep_tokenizer(run.tokenizer, folder)
            if contamination := contamination_report(recipe):
                (folder / "contamination.md").write_text(contamination)
        barrier()
        last: Model | None = None
        for stage in recipe.stages:
            if stage.name in names:
                # Its optimizer and gradients go with it: their memory is the next stage's.
                last = None
                gc.collect()
                last = _run_stage(run, stage, verifier, backends, console, watchdog)
        evaluations = past_evaluations(folder)
        release = None
        if only is None:
            release = write_release(run, last or run.finished_model(recipe.stages[-1]), evaluations)
        if evaluations:
            console.print(evaluation_table(evaluations).terminal())
        report = build_report(folder) if is_rank_zero() else folder / "report.html"
    return RunResult(folder, report, release, evaluations)


def _run_stage(
    run: RunContext,
    stage: SftStage | RlStage,
    verifier: Verifier,
    backends: Backends,
    console: Console,
    watchdog: Watchdog,
) -> Model | None:
    """Trains a stage, keeps its model, evaluates it; whatever is already done is not done again."""
    folder = run.stage_folder(stage.name)
    model: Model | None = None
    if not (folder / "model").is_dir():
        folder.mkdir(exist_ok=True)
        if isinstance(stage, SftStage):
            model = train_sft(run, stage, watchdog).model
        else:
            model = train_rl(run, stage, verifier, backends, watchdog).model
        watchdog.set_location(f"stage {stage.name}, its end")
        told = {"thinking.json": thinking_json(run.recipe, run.folder, Point(stage))}
        save_model(run, model, folder / "model", told)
    else:
        console.print(f"{stage.name}  done before", highlight=False)
    if is_rank_zero() and not run.recipe.keeps_checkpoints(stage):
        shutil.rmtree(checkpoint_folder(folder), ignore_errors=True)
    if is_rank_zero():
        shutil.rmtree(folder / "reference", ignore_errors=True)
    evaluated = {record["stage"] for record in past_evaluations(run.folder)}
    if stage.evaluate and stage.name not in evaluated:
        model = model or run.finished_model(stage)
        record = evaluate_stage(run, stage, model, verifier, backends)
        console.print(_in_words(record), highlight=False)
    barrier()
    return model


def _workers() -> int:
    """Processes that judge answers, of each training process: the cores that are left, eight at most."""
    mine = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(8, max(1, mine - 1))


def _in_words(record: dict[str, Any]) -> str:
    return (
        f"{record['stage']}  accuracy {accuracy_text(record)} "
        f"on {record['problems']} held-out problems, parallel ratio {record['parallel_ratio']:.1%}"
    )
