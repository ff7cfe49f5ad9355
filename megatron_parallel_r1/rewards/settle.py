"""What can be told without algebra: equal text, equal spelling, exact numbers.

That decides every pair of plain numbers; what it leaves open goes to a worker process (`verifier.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_parallel_r1.rewards.normalize import canonical
from megatron_parallel_r1.rewards.number import read_number, same_number

MAX_CHARS = 1000
"""No answer worth reading is longer; longer text is compared as it stands."""

Reason = Literal["empty", "text", "too long", "normalised", "number", "algebra", "timeout", "crash"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether an answer is right, and which step decided it."""

    correct: bool
    reason: Reason


def settle(answer: str | None, reference: str) -> Verdict | None:
    """Decides a pair without algebra; None where only algebra can. Bounded time for any input."""
    answer = (answer or "").strip()
    reference = reference.strip()
    if not answer or not reference:
        return Verdict(False, "empty")
    if answer == reference:
        return Verdict(True, "text")
    if max(len(answer), len(reference)) > MAX_CHARS:
        return Verdict(False, "too long")
    left, right = read_number(answer), read_number(reference)
    if left is None or right is None:
        mine, theirs = canonical(answer), canonical(reference)
        left, right = mine.number, theirs.number
        if mine.name and theirs.name and mine.name != theirs.name:
            return None
        if mine.body == theirs.body and mine.body:
            return Verdict(True, "normalised")
        if (left and theirs.is_words) or (right and mine.is_words):
            return Verdict(False, "normalised")
        if left is None or right is None:
            return None
    return Verdict(same_number(left, right), "number")
