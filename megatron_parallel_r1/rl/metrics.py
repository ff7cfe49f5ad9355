"""Verifies traces, computes the metrics of a step, and selects the traces that the report shows."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.data.prompts import decode
from megatron_parallel_r1.report.traces import trace_record
from megatron_parallel_r1.rewards.base import Judged
from megatron_parallel_r1.rewards.verification import ResponseToJudge, judge
from megatron_parallel_r1.rewards.verifier import Verifier
from megatron_parallel_r1.rl.path_results import mean, path_lengths
from megatron_parallel_r1.rl.rollout_batch import Rollouts, stale_groups, staleness
from megatron_parallel_r1.thought.trace import Outline, Trace
from megatron_parallel_r1.utils.rank import is_rank_zero

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def judge_traces(
    traces: Sequence[Trace],
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    verifier: Verifier,
) -> list[Judged]:
    """Verifies the final answer of each trace's main text, and its format."""
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
    """Shares of the groups of `size` traces with a correct trace (pass@size), and with only correct ones."""
    groups = [judged[start : start + size] for start in range(0, len(judged), size)]
    return {
        "group_pass": fmean(any(j.correct for j in group) for group in groups),
        "group_solved": fmean(all(j.correct for j in group) for group in groups),
    }


def trace_metrics(outlines: Sequence[Outline], judged: Sequence[Judged]) -> dict[str, float | None]:
    """Means over traces; those over blocks are None if no trace has a block.

    `first_block` is the relative position of a trace's first block, 0 at its start and 1 at its end: early
    blocks explore, late ones verify. `well_formed` is the share of blocks that the policy closed itself and
    well-formed. `path_length` counts the tokens between a path's tags; `path_difference` is defined in
    `rewards/path_diversity.py`. `unanswered` is the share of traces without a final answer, `unverified` that
    of traces whose verification timed out, crashed or was given up; both count as wrong.
    """
    blocks = sum(j.format.blocks for j in judged)
    places = [outline.tree.blocks[0].start / outline.length for outline in outlines if outline.tree.blocks]
    return {
        "accuracy": fmean(j.correct for j in judged),
        "unanswered": fmean(j.extracted is None for j in judged),
        "unverified": fmean(j.reason in ("timeout", "crash") for j in judged),
        "parallel_ratio": fmean(j.format.parallel for j in judged),
        "well_formed": sum(j.format.well_formed_blocks for j in judged) / blocks if blocks else None,
        "blocks_per_trace": blocks / len(outlines),
        "paths_per_block": sum(j.format.paths for j in judged) / blocks if blocks else None,
        "path_length": mean(length for outline in outlines for length in path_lengths(outline.tree)),
        "path_difference": mean(j.difference for j in judged if j.difference is not None),
        "first_block": fmean(places) if places else None,
        "length": fmean(outline.length for outline in outlines),
        "critical_length": fmean(j.critical_length for j in judged),
        "truncated": fmean(outline.finish == "length" for outline in outlines),
        **_plan_metrics(outlines, judged),
    }


def _plan_metrics(outlines: Sequence[Outline], judged: Sequence[Judged]) -> dict[str, float]:
    """Mean tokens of a block's plan, and mean share of tokens off the critical path; {} without plans."""
    blocks = [block for outline in outlines for _, block in outline.tree.all_blocks()]
    plans = [block.fork - block.start - 1 for block in blocks if block.planned is not None]
    if not plans:
        return {}
    off_path = (1 - j.critical_length / j.length for j in judged if j.length)
    return {"plan_length": fmean(plans), "acceleration": fmean(off_path)}


def source_metrics(rollouts: Rollouts) -> dict[str, float]:
    """Means over the traces of each source of a step's problems: `accuracy/<source>`, `reward/<source>`."""
    metrics: dict[str, float] = {}
    sources = [problem.source for problem in rollouts.problems]
    for source in sorted(set(sources)):
        here = [index for index, other in enumerate(sources) if other == source]
        metrics[f"accuracy/{source}"] = fmean(rollouts.judged[index].correct for index in here)
        rewards = [reward for index in here if (reward := rollouts.scores[index].total) is not None]
        if rewards:
            metrics[f"reward/{source}"] = fmean(rewards)
    return metrics


def staleness_metrics(outlines: Sequence[Outline], step: int, most: int, size: int) -> dict[str, float]:
    """Mean and largest staleness of a step's traces, in updates, and the number of groups above `most`."""
    ages = [staleness(outline, step) for outline in outlines]
    return {
        "staleness": fmean(ages),
        "staleness_max": max(ages),
        "groups_stale": sum(stale_groups(outlines, step, most, size)),
    }


def sample_traces(
    rollouts: Rollouts, count: int, tokenizer: PreTrainedTokenizerBase
) -> Sequence[dict[str, Any]]:
    """Records of `count` traces of different problems, alternately correct and wrong while both last.

    Returns:
        Nothing on ranks other than zero, which writes them.
    """
    if not is_rank_zero():
        return ()
    total = len(rollouts.traces)
    ranked = sorted(range(total), key=lambda i: (i * 7919 % total, i))
    right = [i for i in ranked if rollouts.judged[i].correct]
    wrong = [i for i in ranked if not rollouts.judged[i].correct]
    pairs = [i for pair in zip(right, wrong, strict=False) for i in pair]
    chosen = [*pairs, *right[len(wrong) :], *wrong[len(right) :]][:count]
    return [
        trace_record(
            *(rollouts.traces[i].unpack(), rollouts.problems[i], rollouts.judged[i]),
            *(rollouts.rewards[i], tokenizer),
        )
        for i in chosen
    ]
