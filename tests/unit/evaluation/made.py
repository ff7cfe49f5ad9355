"""Records made by hand, and their summary."""

from __future__ import annotations

from megatron_parallel_r1.evaluation.modes import EvaluationMode
from megatron_parallel_r1.evaluation.records import ResponseRecord
from megatron_parallel_r1.evaluation.summary import EvaluationSummary, summarise
from megatron_parallel_r1.rewards.verifier import Verifier


def record(
    problem: str = "0", sample: int = 0, correct: bool = True, blocks: int = 0, **other: object
) -> ResponseRecord:
    """A response of 10 tokens; of those with blocks 6 are critical and the first block stands at token 2."""
    values = {
        "key": f"{problem}/{sample}",
        "benchmark": "made",
        "problem": problem,
        "identity": problem,
        "sample": sample,
        "seed": 7,
        "answer": "1" if correct else "2",
        "references": ("1",),
        "correct": correct,
        "reason": "text",
        "finish": "eos",
        "tokens": 10,
        "critical_tokens": 6 if blocks else 10,
        "blocks": blocks,
        "well_formed_blocks": blocks,
        "paths": 2 * blocks,
        "first_block": 0.2 if blocks else None,
        "first_block_token": 2 if blocks else None,
        "response": "Final Answer: 1 🧮\n",
    }
    return ResponseRecord(**{**values, **other})


def summary(benchmark: str, accuracy: float) -> EvaluationSummary:
    """Of four problems with one response each."""
    records = [[record(str(index), correct=index < 4 * accuracy)] for index in range(4)]
    return summarise("made", None, benchmark, EvaluationMode.of("parallel"), records, Verifier()).summary
