"""Which results are held against each other, and what the paired tests say.

Over training: each checkpoint against the first one, in the same mode. Between modes: each mode against the
first one, of the same checkpoint. Both on the same problems of one benchmark.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_parallel_r1.evaluation.runs import Result
from megatron_parallel_r1.evaluation.statistics import Comparison, compare, holm
from megatron_parallel_r1.evaluation.summary import Summary


@dataclass(frozen=True, slots=True)
class Pair:
    """`after` against `before`; `adjusted` is Holm's p over all pairs of the comparison."""

    before: Summary
    after: Summary
    found: Comparison
    adjusted: float


def pairs_of(results: Sequence[Result], seed: int = 0) -> list[Pair]:
    """All pairs, by benchmark; results of one name and mode come in the order of checkpoints."""
    chosen: list[tuple[Result, Result]] = []
    for index, after in enumerate(results):
        earlier = results[:index]
        same_mode = [r for r in earlier if _alike(r, after, "benchmark", "mode")]
        same_model = [r for r in earlier if _alike(r, after, "benchmark", "checkpoint", "step")]
        chosen += [(group[0], after) for group in (same_mode, same_model) if group]
    tested = [(before, after, compare(before.scores, after.scores, seed)) for before, after in chosen]
    common = [(before, after, found) for before, after, found in tested if found is not None]
    adjusted = holm([found.p for _, _, found in common])
    return [
        Pair(before.summary, after.summary, found, p)
        for (before, after, found), p in zip(common, adjusted, strict=True)
    ]


def _alike(one: Result, other: Result, *names: str) -> bool:
    return all(getattr(one.summary, name) == getattr(other.summary, name) for name in names)
