"""Chooses the traces of a step that the report keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_parallel_r1.report.traces import trace_record
from megatron_parallel_r1.rl.rollout_batch import Rollouts
from megatron_parallel_r1.run.context import RunContext
from megatron_parallel_r1.utils.rank import is_rank_zero


def sample_traces(run: RunContext, rollouts: Rollouts, count: int) -> Sequence[dict[str, Any]]:
    """Records of `count` traces of different problems, right and wrong ones alternating where there are both.

    Returns:
        None of them on other ranks than zero, which writes them.
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
            rollouts.traces[i], rollouts.problems[i], rollouts.judged[i], rollouts.rewards[i], run.tokenizer
        )
        for i in chosen
    ]
