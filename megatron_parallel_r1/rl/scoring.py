"""Scores judged traces. A user's reward is called once for each trace, and every rank gets its result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.data.prompts import decode
from megatron_parallel_r1.distributed.collectives import (
    gather_from_replicas,
    is_replica_leader,
    replica_slice,
)
from megatron_parallel_r1.rewards.base import BlockText, Judged, JudgedTrace, Reward, Score
from megatron_parallel_r1.rewards.path_diversity import content_span
from megatron_parallel_r1.rl.rollout_batch import KEPT, Rollouts
from megatron_parallel_r1.thought.trace import Trace
from megatron_parallel_r1.utils.jsonl import JsonlWriter
from megatron_parallel_r1.utils.rank import is_rank_zero

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNSCORED_FILE = "unscored_traces.jsonl"


def score(
    reward: Reward,
    rollouts: Rollouts,
    size: int,
    step: int,
    tokenizer: PreTrainedTokenizerBase,
    first: int = 0,
    world: dist.ProcessGroup | None = None,
) -> list[Score]:
    """Computes the reward of each trace.

    Terms of this package are pure and cheap: every rank computes them. As soon as one is a user's function,
    the leaders of the replicas score whole groups and all ranks train on what they found: the function may
    draw lots, ask a judge, or compare the traces of a group.

    Args:
        rollouts: whole groups, the same on every rank.
        size: traces of a group.
        step: counted from 0.
        first: number of the first trace within the step.
        world: process group of all ranks, which a second thread needs; None: the default group.

    Raises:
        UserError: a user's function raised, or returned no number; every rank raises it.
    """
    if not reward.user_terms:
        return reward.score_all(rollouts.judged, step)

    def work() -> list[Score]:
        groups = replica_slice(range(len(rollouts) // size))
        if not (groups and is_replica_leader()):
            return []
        own = range(groups[0] * size, (groups[-1] + 1) * size)
        batch = [
            judged_trace(rollouts.judged[i], rollouts.traces[i].unpack(), rollouts.problems[i], tokenizer)
            for i in own
        ]
        return reward.score_all(batch, step, first + own.start)

    return gather_from_replicas(work, world)


def judged_trace(
    judged: Judged, trace: Trace, problem: Problem, tokenizer: PreTrainedTokenizerBase
) -> JudgedTrace:
    """Adds the problem and the texts of a trace to its verdict."""

    def text(start: int, stop: int) -> str:
        return decode(tokenizer, trace.tokens[start:stop])

    blocks = []
    for _, block in trace.tree.all_blocks():
        spans = [content_span(path) for path in block.paths]
        closing = block.summary
        summary = closing.inside if closing is not None else None
        blocks.append(
            BlockText(
                paths=tuple(text(*span) for span in spans),
                path_tokens=tuple(stop - start for start, stop in spans),
                summary=text(*summary) if summary else None,
                summary_tokens=summary[1] - summary[0] if summary else 0,
            )
        )
    return JudgedTrace(
        **{name: getattr(judged, name) for name in Judged.__slots__},
        question=problem.prompt,
        response=text(0, len(trace.tokens)),
        blocks=tuple(blocks),
        tokens=trace.tokens,
        finish=trace.finish,
        columns=problem.columns,
    )


def keep_unscored(rollouts: Rollouts, step: int, folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Writes the traces of a step that could not be scored to `unscored_traces.jsonl`; returns its path."""
    path = folder / UNSCORED_FILE
    if is_rank_zero():
        with JsonlWriter(path, through=0) as lines:
            traces = (trace.unpack() for trace in rollouts.traces)
            for number, (trace, problem) in enumerate(zip(traces, rollouts.problems, strict=True)):
                lines.write(
                    {
                        "step": step,
                        "trace": number,
                        "problem": problem.prompt,
                        "answers": problem.answers,
                        "response": decode(tokenizer, trace.tokens),
                        **{name: getattr(trace, name) for name in KEPT},
                    }
                )
    return path
