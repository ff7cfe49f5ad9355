"""Terms that a reward may add up; `weights.py` says how much each counts, and when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from megatron_parallel_r1.rewards.base import Judged

Measure = Literal["total", "critical"]


@dataclass(frozen=True, slots=True)
class Accuracy:
    """+1 for a right final answer, else -1: S1 of arXiv 2509.07980."""

    def __call__(self, judged: Judged, step: int) -> float:
        return 1.0 if judged.correct else -1.0


@dataclass(frozen=True, slots=True)
class Parallel:
    """1 for a right answer of a well-formed parallel trace, else 0: what the paper's S2 pays a bonus for."""

    def __call__(self, judged: Judged, step: int) -> float:
        return 1.0 if judged.correct and judged.well_formed else 0.0


@dataclass(frozen=True, slots=True)
class AccuracyTimesParallel:
    """+1 for a right answer of a well-formed parallel trace, else -1: it stabilises the format."""

    def __call__(self, judged: Judged, step: int) -> float:
        return 1.0 if judged.correct and judged.well_formed else -1.0


@dataclass(frozen=True, slots=True)
class Diversity:
    """How much the sibling paths of a trace differ, 0..1 (`siblings.py`); 0 without two siblings.

    Attributes:
        only_right: 0 also where the answer is wrong, so that noise in the paths does not pay.
    """

    only_right: bool = True

    def __call__(self, judged: Judged, step: int) -> float:
        if self.only_right and not judged.correct:
            return 0.0
        return judged.difference or 0.0


@dataclass(frozen=True, slots=True)
class Length:
    """What a long trace costs: 0 up to `free` tokens, -1 from `limit` on, linear between.

    With `limit` the longest response and `free` so much shorter as its buffer is, this is DAPO's soft
    over-long punishment (arXiv 2503.14476, equation 13).

    Attributes:
        measure: `total` counts all tokens, `critical` of each block only the longest path.
    """

    free: int = 0
    limit: int = 3000
    measure: str = "total"

    def __post_init__(self) -> None:
        if not 0 <= self.free < self.limit:
            raise ValueError(f"free {self.free} and limit {self.limit}; set 0 <= free < limit")
        if self.measure not in get_args(Measure):
            raise ValueError(f"measure {self.measure!r}; use one of {', '.join(get_args(Measure))}")

    def __call__(self, judged: Judged, step: int) -> float:
        tokens = judged.critical_length if self.measure == "critical" else judged.length
        return -min(max((tokens - self.free) / (self.limit - self.free), 0.0), 1.0)


def score_accuracy(judged: Judged) -> float:
    """1 for a right final answer, else 0: what every evaluation reports, whatever was trained on."""
    return float(judged.correct)
