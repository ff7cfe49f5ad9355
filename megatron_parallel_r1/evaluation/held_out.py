"""Evaluates the weights in an engine on held-out problems, within a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_parallel_r1.config.recipe import Evaluation
from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.evaluation.statistics import ProblemScores
from megatron_parallel_r1.rewards.base import Judged
from megatron_parallel_r1.rewards.verifier import Verifier
from megatron_parallel_r1.rl.metrics import trace_metrics
from megatron_parallel_r1.rl.rollout_worker import sample_and_verify
from megatron_parallel_r1.rollout.thinking import Thinker
from megatron_parallel_r1.thought.trace import Trace
from megatron_parallel_r1.utils.seeding import seed_series

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class HeldOutResult:
    """A record for `eval.jsonl`, and the traces with their verdicts, problem by problem."""

    record: dict[str, Any]
    traces: list[Trace]
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
    scores = ProblemScores(tuple(problem.id for problem in problems), tuple(right), samples).interval
    metrics = trace_metrics(traces, judged)
    metrics["well_formed_blocks"] = metrics.pop("well_formed")
    record = {
        "kind": "eval",
        "mode": thinker.settings.mode,
        "paths": thinker.settings.paths,
        "problems": len(problems),
        "samples": samples,
        **metrics,
        "accuracy": scores.value,
        "ci95": (scores.high - scores.low) / 2,
        "ci95_low": scores.low,
        "ci95_high": scores.high,
    }
    return HeldOutResult(record, traces, judged)
