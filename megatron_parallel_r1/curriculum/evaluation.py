"""Evaluation on held-out problems: plain accuracy, in the decoding loop that training uses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_parallel_r1.architecture.weight_table import check_fit
from megatron_parallel_r1.checkpoint_formats.hf_folder import hf_sizes, load_hf_folder
from megatron_parallel_r1.config.recipe import Evaluation, Recipe
from megatron_parallel_r1.config.stages import Stage
from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.data.tokenizers import open_tokenizer
from megatron_parallel_r1.distributed import process
from megatron_parallel_r1.distributed.parallel_config import check_parallel
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.evaluation.checkpoints import read_tags
from megatron_parallel_r1.model.gpt import Model
from megatron_parallel_r1.model.weights import hf_tensors
from megatron_parallel_r1.report.trace_record import trace_record
from megatron_parallel_r1.rewards.base import Judged
from megatron_parallel_r1.rewards.registry import score_accuracy
from megatron_parallel_r1.rewards.verifier import Verifier
from megatron_parallel_r1.rl.metrics import trace_metrics
from megatron_parallel_r1.rl.rollout_worker import sample_and_verify
from megatron_parallel_r1.rollout.thinking import Thinker
from megatron_parallel_r1.run.backends import Backends, engine_of_checkpoint
from megatron_parallel_r1.run.context import RunContext
from megatron_parallel_r1.run.datasets import evaluation_problems
from megatron_parallel_r1.run.folder import steps_done
from megatron_parallel_r1.thought.trace import Trace
from megatron_parallel_r1.utils.jsonl import JsonlWriter
from megatron_parallel_r1.utils.rank import is_rank_zero, world_size
from megatron_parallel_r1.utils.seeding import derive_seed, seed_series

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 6  # traces of an evaluation that the report shows


def evaluate(
    thinker: Thinker[Any],
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    verifier: Verifier,
    template: str,
    asked: Evaluation,
    seed: int,
) -> tuple[dict[str, Any], list[Trace], list[Judged]]:
    """`asked.samples_per_problem` traces of each problem, scored by accuracy alone.

    `ci95` is half the width of the 95 % interval of the mean over problems (normal approximation).
    """
    each = [problem for problem in problems for _ in range(asked.samples_per_problem)]
    seeds = seed_series(len(each), seed)
    traces, judged = sample_and_verify(
        thinker, each, seeds, tokenizer, template, verifier, asked.max_concurrent_rollouts
    )
    scores_PS = np.reshape([score_accuracy(j) for j in judged], (len(problems), asked.samples_per_problem))
    means_P = scores_PS.mean(1)
    error = means_P.std(ddof=1) / len(means_P) ** 0.5 if len(means_P) > 1 else float("nan")
    metrics = trace_metrics(traces, judged)
    metrics["well_formed_blocks"] = metrics.pop("well_formed")
    record = {
        "kind": "eval",
        "mode": thinker.settings.mode,
        "paths": thinker.settings.paths,
        "problems": len(problems),
        "samples": asked.samples_per_problem,
        **metrics,
        "accuracy": float(means_P.mean()),
        "ci95": float(1.96 * error),
    }
    return record, traces, judged


def evaluate_stage(
    run: RunContext, stage: Stage, model: Model, verifier: Verifier, backends: Backends
) -> dict[str, Any]:
    """Evaluates a finished stage; the record goes to `eval.jsonl`, a few traces to `eval_traces.jsonl`."""
    recipe = run.recipe
    step = steps_done(run.folder, stage)
    problems = evaluation_problems(recipe.evaluation.data, recipe.evaluation.problems)
    seed = run.seed_of("evaluation")
    thinking = recipe.thinking_of(stage)
    with backends.open(model, thinking) as backend:
        backend.engine.load_weights(hf_tensors(model), version=step)
        thinker = Thinker(backend.engine, run.tags, thinking)
        measured, traces, judged = evaluate(
            thinker, problems, run.tokenizer, verifier, recipe.prompt_template, recipe.evaluation, seed
        )
    record = {"stage": stage.name, "step": step, **measured}
    if not is_rank_zero():
        return record
    # Anew each time: an evaluation that was killed before its record may have left some.
    with JsonlWriter(run.stage_folder(stage.name) / "eval_traces.jsonl", through=0) as kept:
        for index in range(0, len(traces), max(1, len(traces) // SHOWN)):
            problem = problems[index // recipe.evaluation.samples_per_problem]
            line = trace_record(traces[index], problem, judged[index], None, run.tokenizer)
            kept.write({"stage": stage.name, "step": step, **line})
    with JsonlWriter(run.folder / "eval.jsonl") as lines:
        lines.write(record)
    return record


def evaluate_checkpoint(recipe: Recipe, checkpoint: Path | None = None) -> dict[str, Any]:
    """Evaluates a Hugging Face folder with the recipe's evaluation and its last stage's thinking.

    Args:
        checkpoint: None: the release of the recipe's own run.

    Raises:
        UserError: the folder is none, or the recipe has no evaluation.
    """
    if checkpoint is None and recipe.seeds is not None:
        raise UserError("the recipe has a release for each of its seeds; name one with --checkpoint")
    folder = checkpoint or recipe.out / recipe.name / "release"
    if recipe.evaluation is None:
        raise UserError("the recipe has no `evaluation`; add one to say on which problems")
    shape, _ = load_hf_folder(folder)
    check_fit(shape, hf_sizes(folder))
    tokenizer = open_tokenizer(folder)
    tags = read_tags(tokenizer, folder)
    parallel, asked = recipe.parallel, recipe.evaluation
    check_parallel(shape, parallel, world_size())
    thinking = recipe.thinking_of(recipe.stages[-1])
    with (
        process.running(recipe.seed, parallel),
        Verifier() as verifier,
        engine_of_checkpoint(recipe, folder, thinking) as engine,
    ):
        thinker = Thinker(engine, tags, thinking)
        record, _, _ = evaluate(
            thinker,
            evaluation_problems(asked.data, asked.problems),
            tokenizer,
            verifier,
            recipe.prompt_template,
            asked,
            derive_seed(recipe.seed, "evaluation"),
        )
    return {"stage": folder.name, "step": 0, **record}
