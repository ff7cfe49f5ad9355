"""What a reward is given, and what it must offer: the contract of this room.

A new kind of reward is a frozen dataclass whose fields are its settings, and one line in `registry.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from megatron_parallel_r1.rewards.formats import Format
from megatron_parallel_r1.rewards.settle import Reason


@dataclass(frozen=True, slots=True)
class Judged:
    """All that a reward may depend on in one trace.

    Attributes:
        correct: its final answer is a right one.
        format: facts of its parallel structure.
        extracted: the final answer as written, None where it gives none.
        reason: which step decided `correct`; `timeout` and `crash` are worth counting.
    """

    correct: bool
    format: Format
    extracted: str | None
    reason: Reason

    @property
    def well_formed(self) -> bool:
        """It thinks in parallel, and passes the format check."""
        return self.format.well_formed


class Reward(Protocol):
    """A pure function of a judged trace and the training step: no state, no randomness."""

    def __call__(self, judged: Judged, step: int) -> float:
        """The trace's reward at `step` (0, 1, …), which for all traces of a step is the same function."""
        ...

    def term(self, step: int) -> str:
        """The name of what is rewarded at `step`, for the metrics."""
        ...
