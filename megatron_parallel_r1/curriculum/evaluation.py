"""Evaluates a stage of a run, or a checkpoint with a recipe's settings, on held-out problems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_parallel_r1.checkpoint_formats.hf_folder import load_hf_folder
from megatron_parallel_r1.config.data import has_sources
from megatron_parallel_r1.config.evaluation import Evaluation
from megatron_parallel_r1.config.recipe import Recipe
from megatron_parallel_r1.config.stages import Stage
from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.data.tokenizers import open_thinking_tokenizer
from megatron_parallel_r1.distributed import process
from megatron_parallel_r1.distributed.parallel_config import check_parallel
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.evaluation.statistics import Interval, ProblemScores
from megatron_parallel_r1.model.gpt import Model
from megatron_parallel_r1.report.traces import trace_record
from megatron_parallel_r1.rewards.base import Judged
from megatron_parallel_r1.rewards.verifier import Verifier
from megatron_parallel_r1.rl.metrics import trace_metrics
from megatron_parallel_r1.rl.packed_trace import PackedTrace
from megatron_parallel_r1.rl.rollout_worker import sample_and_verify
from megatron_parallel_r1.rollout.thinking import Thinker
from megatron_parallel_r1.run.backends import Backends, engine_of_checkpoint
from megatron_parallel_r1.run.context import RunContext
from megatron_parallel_r1.run.folder import steps_done
from megatron_parallel_r1.run.sources import evaluation_problems
from megatron_parallel_r1.utils.jsonl import JsonlWriter
from megatron_parallel_r1.utils.rank import is_rank_zero, world_size
from megatron_parallel_r1.utils.seeding import derive_seed, seed_series

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRACES_IN_REPORT = 6  # of one evaluation


@dataclass(frozen=True, slots=True)
class HeldOutResult:
    """A record for `eval.jsonl`, and the traces with their verdicts, problem by problem."""

    record: dict[str, Any]
    traces: list[PackedTrace]
    judged: list[Judged]


def evaluate_held_out(
    thinker: Thinker[Any],
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    verifier: Verifier,
    template: str,
    settings: Evaluation,
    seed: int,
) -> HeldOutResult:
    """Draws traces of each problem and scores them by accuracy, whatever reward the model was trained with.

    All processes of a run call it; each copy of the model draws its share.

    Where problems have several sources, `accuracy/<source>` and its interval are given for each.
    `ci95_low` and `ci95_high` bound the 95 % interval of the accuracy (`score_interval`), as in every
    evaluation; `ci95` is half its width.
    """
    samples = settings.samples_per_problem
    repeated = [problem for problem in problems for _ in range(samples)]
    seeds = seed_series(len(repeated), seed)
    traces, judged = sample_and_verify(
        thinker, repeated, seeds, tokenizer, template, verifier, settings.max_concurrent_rollouts
    )
    right = [
        sum(j.correct for j in judged[start : start + samples]) for start in range(0, len(judged), samples)
    ]
    scores = _interval(problems, right, samples)
    metrics = trace_metrics([trace.outline for trace in traces], judged)
    metrics["well_formed_blocks"] = metrics.pop("well_formed")
    record = {
        "kind": "eval",
        "mode": thinker.settings.mode,
        "paths": thinker.settings.most_paths,
        "problems": len(problems),
        "samples": samples,
        **metrics,
        "accuracy": scores.value,
        "ci95": (scores.high - scores.low) / 2,
        "ci95_low": scores.low,
        "ci95_high": scores.high,
    }
    if has_sources(settings.data):
        for source in sorted({problem.source for problem in problems}):
            here = [index for index, problem in enumerate(problems) if problem.source == source]
            part = _interval([problems[index] for index in here], [right[index] for index in here], samples)
            record[f"problems/{source}"] = len(here)
            record[f"accuracy/{source}"] = part.value
            record[f"ci95_low/{source}"], record[f"ci95_high/{source}"] = part.low, part.high
    return HeldOutResult(record, traces, judged)


def evaluate_stage(
    run: RunContext, stage: Stage, model: Model, verifier: Verifier, backends: Backends
) -> dict[str, Any]:
    """Evaluates a finished stage; writes the record to `eval.jsonl`, a few traces to `eval_traces.jsonl`."""
    recipe, settings = run.recipe, run.recipe.evaluation
    assert settings is not None, "a recipe without `evaluation` evaluates no stage"
    step = steps_done(run.folder, stage)
    problems = evaluation_problems(settings.data, settings.problems)
    seed = run.seed_of("evaluation")
    thinking = recipe.thinking_of(stage)
    with backends.engine_with(model, thinking, step) as engine:
        thinker = Thinker(engine, run.tags, thinking)
        result = evaluate_held_out(
            thinker, problems, run.tokenizer, verifier, recipe.prompt_template, settings, seed
        )
    record = {"stage": stage.name, "step": step, **result.record}
    if not is_rank_zero():
        return record
    # Rewritten: an evaluation that was killed before it wrote its record may have left some.
    with JsonlWriter(run.stage_folder(stage.name) / "eval_traces.jsonl", through=0) as traces:
        for index in range(0, len(result.traces), max(1, len(result.traces) // TRACES_IN_REPORT)):
            problem = problems[index // settings.samples_per_problem]
            trace = result.traces[index].unpack()
            line = trace_record(trace, problem, result.judged[index], None, run.tokenizer)
            traces.write({"stage": stage.name, "step": step, **line})
    with JsonlWriter(run.folder / "eval.jsonl") as lines:
        lines.write(record)
    return record


def evaluate_checkpoint(recipe: Recipe, checkpoint: Path | None = None) -> dict[str, Any]:
    """Evaluates a Hugging Face folder with the recipe's evaluation and its last stage's thinking.

    Args:
        checkpoint: default: the release of the recipe's run.

    Raises:
        UserError: the folder holds no model, or the recipe has no evaluation.
    """
    if checkpoint is None and recipe.seeds is not None:
        raise UserError("the recipe has a release for each of its seeds; name one with --checkpoint")
    folder = checkpoint or recipe.out / recipe.name / "release"
    if recipe.evaluation is None:
        raise UserError("the recipe has no `evaluation`; add one to say on which problems")
    shape, _ = load_hf_folder(folder)
    thinking = recipe.thinking_of(recipe.trained_stages[-1])
    tokenizer, tags = open_thinking_tokenizer(folder, thinking.mode)
    parallel, settings = recipe.parallel, recipe.evaluation
    check_parallel(shape, parallel, world_size())
    with (
        process.running(recipe.seed, parallel),
        Verifier() as verifier,
        engine_of_checkpoint(recipe, folder, thinking) as engine,
    ):
        thinker = Thinker(engine, tags, thinking)
        result = evaluate_held_out(
            thinker,
            evaluation_problems(settings.data, settings.problems),
            tokenizer,
            verifier,
            recipe.prompt_template,
            settings,
            derive_seed(recipe.seed, "evaluation"),
        )
    return {"stage": folder.name, "step": 0, **result.record}


def _interval(problems: Sequence[Problem], right: Sequence[int], samples: int) -> Interval:
    return ProblemScores(tuple(problem.id for problem in problems), tuple(right), samples).interval
