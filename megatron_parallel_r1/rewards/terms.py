"""Rewards that are the same at every step; `schedule.py` alternates between them.

Values are those of arXiv 2509.07980.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_parallel_r1.rewards.base import Judged


@dataclass(frozen=True, slots=True)
class Accuracy:
    """+1 for a right final answer, else -1: the paper's S1."""

    def __call__(self, judged: Judged, step: int) -> float:
        return 1.0 if judged.correct else -1.0

    def term(self, step: int) -> str:
        return "accuracy"


@dataclass(frozen=True, slots=True)
class ParallelBonus:
    """For a right answer +1, of a well-formed parallel trace 1 + `bonus`; else -1."""

    bonus: float = 0.2

    def __call__(self, judged: Judged, step: int) -> float:
        if not judged.correct:
            return -1.0
        return 1.0 + self.bonus if judged.well_formed else 1.0

    def term(self, step: int) -> str:
        return "parallel_bonus"


@dataclass(frozen=True, slots=True)
class AccuracyTimesParallel:
    """+1 for a right answer of a well-formed parallel trace, else -1: it stabilises the format."""

    def __call__(self, judged: Judged, step: int) -> float:
        return 1.0 if judged.correct and judged.well_formed else -1.0

    def term(self, step: int) -> str:
        return "accuracy_x_parallel"


def score_accuracy(judged: Judged) -> float:
    """1 for a right final answer, else 0: what every evaluation reports, whatever was trained on."""
    return float(judged.correct)
