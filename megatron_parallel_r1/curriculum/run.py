"""Runs a recipe: stages, evaluation, release, report. An interrupted run resumes."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_parallel_r1.coldstart.distill import distill
from megatron_parallel_r1.config.recipe import Recipe, is_finished
from megatron_parallel_r1.config.stages import AnyStage, DistillStage, SftStage
from megatron_parallel_r1.curriculum.banner import banner
from megatron_parallel_r1.curriculum.evaluation import evaluate_stage
from megatron_parallel_r1.curriculum.model_card import ReleasePoint, run_card, thinking_json
from megatron_parallel_r1.curriculum.start_checks import check_engine, check_stage_data
from megatron_parallel_r1.data.prompts import chat_template_for
from megatron_parallel_r1.distributed import process
from megatron_parallel_r1.distributed.collectives import any_rank_true, barrier, run_on_rank_zero
from megatron_parallel_r1.distributed.watchdog import Watchdog
from megatron_parallel_r1.errors import Stopped, UserError
from megatron_parallel_r1.evaluation.stage_evaluator import StageEvaluator
from megatron_parallel_r1.model.gpt import Model
from megatron_parallel_r1.report.evaluation_table import accuracy_text, evaluation_table, seed_table
from megatron_parallel_r1.rewards.verifier import Verifier
from megatron_parallel_r1.rl.loop import train_rl
from megatron_parallel_r1.run.backends import Backends, server_folder
from megatron_parallel_r1.run.context import RunContext
from megatron_parallel_r1.run.datasets import (
    check_sources,
    contamination_report,
    data_digests,
    data_report,
)
from megatron_parallel_r1.run.folder import (
    as_begun,
    check_data,
    is_resumable,
    keep_tokenizer,
    open_run_folder,
    past_evaluations,
)
from megatron_parallel_r1.run.lock import LOCK, lock_folder, opening, others_at_work, stage_lock
from megatron_parallel_r1.run.save import save_model
from megatron_parallel_r1.run.stage_loop import checkpoint_folder
from megatron_parallel_r1.run.wandb_log import check_wandb
from megatron_parallel_r1.sft.loop import train_sft
from megatron_parallel_r1.utils.devices import keep_memory_shareable
from megatron_parallel_r1.utils.exit import stop_signal_pending
from megatron_parallel_r1.utils.files import check_writable
from megatron_parallel_r1.utils.rank import is_rank_zero


def open_console() -> Console:
    """A console as wide as the terminal, or 160 columns in a log; quiet on ranks other than zero."""
    console = Console(quiet=not is_rank_zero())
    return console if console.is_terminal else Console(width=160, quiet=console.quiet)


@dataclass(frozen=True, slots=True)
class RunResult:
    """Paths and evaluations of a finished run; `release` is None for a run of selected stages."""

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
    """Runs a recipe, once for each of its seeds, and compares the seeds in `<out>/<name>/seeds.md`.

    Args:
        only: names of the stages to run; None: all stages and the release.
        fresh: delete the folder's contents and start over.
        adapt: resume although settings of unfinished stages have changed.

    Raises:
        UserError: a file or setting is wrong; finished stages stay.
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
    resume = is_resumable(recipe, folder, fresh, adapt, only)
    if resume:
        recipe = as_begun(recipe, folder)
    for needed in (folder, *([recipe.rollout.sync.folder] if recipe.rollout.sync.folder else ())):
        check_writable(needed)
    check_sources(recipe)
    check_wandb(recipe)
    run = RunContext.set_up(recipe, folder, resume)
    if run.new_ids and recipe.model.path is not None and not resume:
        console.print(_fresh_tags(run), highlight=False, markup=False, soft_wrap=True)
    run.check_starts(names)
    run.check_split(names, process.world_size())
    check_stage_data(run, names)
    data = data_digests(recipe)
    if resume:
        check_data(recipe, folder, data, adapt)

    def open_folder() -> None:
        if is_resumable(recipe, folder, fresh, adapt, only) != resume:
            raise UserError(f"{folder}: another command has just used it; start this one again")
        beside = others_at_work(folder, locks)
        open_run_folder(recipe, folder, resume, fresh, data, beside)
        if not resume and not beside:
            keep_tokenizer(run.tokenizer, folder)
        if contamination := contamination_report(recipe):
            (folder / "contamination.md").write_text(contamination)
        if report := data_report(recipe):
            (folder / "data.md").write_text(report)

    if recipe.rollout.engine != "native" and recipe.rollout.sync.transport == "tensor":
        keep_memory_shareable()
    with process.running(recipe.seed, recipe.parallel, recipe.collective_timeout_s) as watchdog:
        check_engine(run, names)
        locks = [*map(stage_lock, sorted(names)), *([LOCK] if only is None else [])]
        with ExitStack() as stack:
            with opening(folder):
                stack.enter_context(lock_folder(folder, locks))
                verifier = stack.enter_context(Verifier(workers=_workers()))
                backends = stack.enter_context(Backends(run, server_folder(folder, only)))
                stack.enter_context(run.exporter)
                run_on_rank_zero(partial(run.exporter.serve, recipe.metrics_port))
                run_on_rank_zero(open_folder)
            text = banner(run, names, process.world_size())
            console.print(text, highlight=False, markup=False, soft_wrap=True)
            last: Model | None = None
            for stage in recipe.stages:
                if stage.name in names:
                    # Frees its optimizer and gradients for the next stage.
                    last = None
                    gc.collect()
                    last = _run_stage(run, stage, verifier, backends, console, watchdog)
            evaluations = past_evaluations(folder)
            release = None
            if only is None:
                release = _write_release(
                    run, last or run.finished_model(recipe.trained_stages[-1]), evaluations
                )
            if evaluations:
                console.print(evaluation_table(evaluations).terminal())
            report = folder / "report.html"
            if is_rank_zero():
                from megatron_parallel_r1.report.html import build_report

                build_report(folder)
    return RunResult(folder, report, release, evaluations)


def _run_stage(
    run: RunContext,
    stage: AnyStage,
    verifier: Verifier,
    backends: Backends,
    console: Console,
    watchdog: Watchdog,
) -> Model | None:
    """Trains a stage, saves its model and evaluates it; skips what is already done."""
    folder = run.stage_folder(stage.name)
    model: Model | None = None
    if is_finished(folder):
        console.print(f"{stage.name}  already done", highlight=False)
    folder.mkdir(exist_ok=True)
    if isinstance(stage, DistillStage):
        if not is_finished(folder):
            distill(run, stage, verifier, backends, watchdog)
        return None
    if not is_finished(folder):
        evaluator = StageEvaluator(run, stage, verifier)
        if isinstance(stage, SftStage):
            trainer = train_sft(run, run.with_traces(stage), backends, watchdog, evaluator)
        else:
            trainer = train_rl(run, stage, verifier, backends, watchdog, evaluator)
        model = trainer.model
        watchdog.set_location(f"stage {stage.name}, its end")
        settings = thinking_json(run.recipe, run.folder, ReleasePoint(stage))
        save_model(run, model, folder / "model", {"thinking.json": settings})
        if any(any_rank_true([stop_signal_pending()], trainer.device)):
            raise Stopped(f"stage {stage.name}: stopped by a signal after its last step, saved")
        if run.recipe.rollout.colocated:
            trainer.memory.offload()  # the model keeps its gradients otherwise, and servers want their memory
        del trainer  # its optimizer and gradients
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
    """Verifier processes per training process: one per remaining core, at most eight."""
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(8, max(1, cores - 1))


def _write_release(run: RunContext, model: Model, evaluations: Sequence[dict[str, Any]]) -> Path:
    """Writes `<run>/release`, a Hugging Face checkpoint, and returns its path.

    Adds `thinking.json`, the decoding settings and prompt of the training, and `README.md`, the model card
    with this run's results. `parallel-r1 release` does the same for any checkpoint of a run.
    """
    release = run.folder / "release"
    end = ReleasePoint(run.recipe.trained_stages[-1])
    extra = {
        "thinking.json": thinking_json(run.recipe, run.folder, end),
        "README.md": run_card(run.recipe, run.folder, run.shape, evaluations, end),
    }
    if run.tokenizer.chat_template is None:
        extra["chat_template.jinja"] = chat_template_for(run.tokenizer)
    save_model(run, model, release, extra)
    return release


def _fresh_tags(run: RunContext) -> str:
    """The remark that tags have rows that were never trained."""
    starts = {"subwords": "their own subwords", "mean": "the mean of all rows"}
    if isinstance(run.recipe.trained_stages[0], SftStage):
        advice = "tag_loss in the metrics of SFT shows how well they are learned"
    else:
        advice = "a model hardly ever writes them before SFT has taught them"
    return (
        f"{run.recipe.model.path}: {len(run.new_ids)} of its 6 tags are new, with rows that begin as "
        f"{starts[run.recipe.model.new_rows]}; {advice}"
    )


def _in_words(record: dict[str, Any]) -> str:
    sources = [name.partition("/")[2] for name in record if name.startswith("accuracy/")]
    return (
        f"{record['stage']}  accuracy {accuracy_text(record)} "
        f"on {record['problems']} held-out problems, parallel ratio {record['parallel_ratio']:.1%}"
    ) + "".join(f", {source} {record[f'accuracy/{source}']:.1%}" for source in sources)
