"""Traces of problems, rolled out and judged by all copies of the model together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from megatron_parallel_r1.data.encode import encode_prompt
from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.rewards.base import Judged
from megatron_parallel_r1.rewards.verifier import Verifier
from megatron_parallel_r1.rollout.thinking import Thinker, roll_out
from megatron_parallel_r1.thought.trace import Trace
from megatron_parallel_r1.train.phases import Phases
from megatron_parallel_r1.train.ranks import gathered, share, speaks
from megatron_parallel_r1.train.scoring import judge_traces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def roll_out_and_judge(
    thinker: Thinker[Any],
    problems: Sequence[Problem],
    seeds: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    verifier: Verifier,
    concurrent: int,
    world: dist.ProcessGroup | None = None,
    phases: Phases | None = None,
) -> tuple[list[Trace], list[Judged]]:
    """One trace of each problem. Each copy works on its share; all processes get all, in order.

    Args:
        seeds: of each problem's trace, so that its draws do not depend on who makes them.
        concurrent: traces in flight at most, of one copy.
        phases: takes down what `draw` and `verify` cost.
        world: all processes, if not by the default group; a second thread needs its own.
    """
    mine, my_seeds = share(problems), share(seeds)
    phases = phases or Phases()

    def work() -> list[tuple[Trace, Judged]]:
        if not (speaks() or thinker.engine.together):
            return []
        prompts = [encode_prompt(tokenizer, template, problem.prompt) for problem in mine]
        with phases.of("draw"):
            traces = asyncio.run(roll_out(thinker, prompts, my_seeds, concurrent))
        # One verdict for all processes of a copy: a time-out could give each another one.
        with phases.of("verify"):
            judged = judge_traces(traces, mine, tokenizer, verifier) if speaks() else []
        return list(zip(traces, judged, strict=False))

    pairs = gathered(work, world)
    return [trace for trace, _ in pairs], [judgement for _, judgement in pairs]
