"""A trace as the report's viewer reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_parallel_r1.data.embedded.traces import stated_result
from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.report.parts import trace_parts
from megatron_parallel_r1.rewards.base import Judged
from megatron_parallel_r1.rewards.verification import extract_answer
from megatron_parallel_r1.rewards.verifier import equivalent
from megatron_parallel_r1.thought.trace import Trace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def trace_record(
    trace: Trace,
    problem: Problem,
    judged: Judged,
    reward: float | None,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """One line of `traces.jsonl`, without stage and step."""

    def judge_path(text: str) -> tuple[str | None, bool | None]:
        stated = extract_answer(text) or stated_result(text)
        if stated is None:
            return None, None
        return stated, any(equivalent(stated, answer) for answer in problem.answers)

    return {
        "problem": problem.prompt,
        "answer": " or ".join(problem.answers),
        "extracted": judged.extracted,
        "correct": judged.correct,
        "reward": reward,
        "finish": trace.finish,
        "text_parts": trace_parts(trace.tokens, trace.tree, tokenizer, judge_path, trace.sampled),
    }
