"""Chooses the results to compare and runs the paired tests.

Over training: each checkpoint against the first one, in the same mode. Between modes: each mode against the
first one, of the same checkpoint. Both on the problems of one benchmark.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_parallel_r1.evaluation.evaluator import BenchmarkResult
from megatron_parallel_r1.evaluation.statistics import Comparison, compare, holm
from megatron_parallel_r1.evaluation.summary import EvaluationSummary


@dataclass(frozen=True, slots=True)
class PairedTest:
    """`after` against `before`; `adjusted` is Holm's p-value over all pairs of the comparison."""

    before: EvaluationSummary
    after: EvaluationSummary
    comparison: Comparison
    adjusted: float


def paired_tests(results: Sequence[BenchmarkResult]) -> list[PairedTest]:
    """All pairs, by benchmark; results of one name and mode come in the order of checkpoints."""
    chosen: list[tuple[BenchmarkResult, BenchmarkResult]] = []
    for index, after in enumerate(results):
        earlier = results[:index]
        same_mode = [r for r in earlier if _agree(r, after, "benchmark", "mode")]
        same_model = [r for r in earlier if _agree(r, after, "benchmark", "checkpoint", "step")]
        chosen += [(group[0], after) for group in (same_mode, same_model) if group]
    tested = [(before, after, compare(before.scores, after.scores)) for before, after in chosen]
    common = [(before, after, comparison) for before, after, comparison in tested if comparison is not None]
    adjusted = holm([comparison.p for _, _, comparison in common])
    return [
        PairedTest(before.summary, after.summary, comparison, p)
        for (before, after, comparison), p in zip(common, adjusted, strict=True)
    ]


def _agree(a: BenchmarkResult, b: BenchmarkResult, *names: str) -> bool:
    return all(getattr(a.summary, name) == getattr(b.summary, name) for name in names)
