"""Verifies traces against their problems, and measures accuracy and the shape of traces."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.data.prompts import decode
from megatron_parallel_r1.rewards.base import Judged
from megatron_parallel_r1.rewards.verification import ResponseToJudge, judge
from megatron_parallel_r1.rewards.verifier import Verifier
from megatron_parallel_r1.rl.path_results import mean, path_lengths
from megatron_parallel_r1.rl.rollout_batch import stale_groups, staleness
from megatron_parallel_r1.thought.layout import critical_length
from megatron_parallel_r1.thought.trace import Trace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def judge_traces(
    traces: Sequence[Trace],
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    verifier: Verifier,
) -> list[Judged]:
    """Judges each trace by the final answer of its main text and by its form."""
    attempts = [
        ResponseToJudge(main_text(trace, tokenizer), trace.tree, problem.answers, trace.sampled, trace.tokens)
        for trace, problem in zip(traces, problems, strict=True)
    ]
    return judge(attempts, verifier)


def main_text(trace: Trace, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text outside blocks and summaries."""
    spans = trace.tree.main_spans()
    return "\n".join(decode(tokenizer, trace.tokens[start:stop]) for start, stop in spans)


def group_metrics(judged: Sequence[Judged], size: int) -> dict[str, float]:
    """Of groups of `size` traces: the share with a right one (pass@size), and with nothing but right ones."""
    groups = [judged[start : start + size] for start in range(0, len(judged), size)]
    return {
        "group_pass": fmean(any(j.correct for j in group) for group in groups),
        "group_solved": fmean(all(j.correct for j in group) for group in groups),
    }


def trace_metrics(traces: Sequence[Trace], judged: Sequence[Judged]) -> dict[str, float | None]:
    """Means over traces; those of blocks are None where no trace has one.

    `first_block` is the place of a trace's first block, 0 at its begin and 1 at its end: it tells exploration
    from verification. `well_formed` is the share of blocks that the policy itself closed in good form.
    `path_length` is in tokens between the path's tags, `path_difference` as in `rewards/path_diversity.py`.
    `unanswered` is the share without a final answer, `unverified` that of answers that cost a verification
    process its life or were never looked at; they count as wrong.
    """
    blocks = sum(j.format.blocks for j in judged)
    places = [t.tree.blocks[0].start / len(t.tokens) for t in traces if t.tree.blocks]
    return {
        "accuracy": fmean(j.correct for j in judged),
        "unanswered": fmean(j.extracted is None for j in judged),
        "unverified": fmean(j.reason in ("timeout", "crash") for j in judged),
        "parallel_ratio": fmean(j.format.parallel for j in judged),
        "well_formed": sum(j.format.well_formed_blocks for j in judged) / blocks if blocks else None,
        "blocks_per_trace": blocks / len(traces),
        "paths_per_block": sum(j.format.paths for j in judged) / blocks if blocks else None,
        "path_length": mean(length for trace in traces for length in path_lengths(trace.tree)),
        "path_difference": mean(j.difference for j in judged if j.difference is not None),
        "first_block": fmean(places) if places else None,
        "length": fmean(len(t.tokens) for t in traces),
        "critical_length": fmean(critical_length(t.tree) for t in traces),
        "truncated": fmean(t.finish == "length" for t in traces),
    }


def staleness_metrics(traces: Sequence[Trace], step: int, most: int, size: int) -> dict[str, float]:
    """Mean and largest staleness of all traces of a step, in updates, and how many groups were too old."""
    ages = [staleness(trace, step) for trace in traces]
    return {
        "staleness": fmean(ages),
        "staleness_max": max(ages),
        "groups_stale": sum(stale_groups(traces, step, most, size)),
    }
