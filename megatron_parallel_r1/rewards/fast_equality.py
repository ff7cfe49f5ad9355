"""What can be told without algebra: equal text, equal spelling, exact numbers, clearly unlike values.

That decides every pair of plain numbers and most wrong formulas; what it leaves open goes to a worker process
(`verifier.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_parallel_r1.rewards.normalize import Canonical, canonical
from megatron_parallel_r1.rewards.number import read_number, same_number
from megatron_parallel_r1.rewards.numeric import Values, differ, read_values

MAX_CHARS = 1000
"""No answer worth reading is longer; longer text is compared as it stands."""

Reason = Literal["empty", "text", "too long", "normalised", "number", "value", "algebra", "timeout", "crash"]


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
        return _settle_formulas(canonical(answer), canonical(reference))
    return Verdict(same_number(left, right), "number")


def _settle_formulas(mine: Canonical, theirs: Canonical) -> Verdict | None:
    if mine.name and theirs.name and mine.name != theirs.name:
        return None
    if mine.body == theirs.body and mine.body:
        return Verdict(True, "normalised")
    left, right = mine.number, theirs.number
    if left and right:
        return Verdict(same_number(left, right), "number")
    if (left and theirs.is_words) or (right and mine.is_words):
        return Verdict(False, "normalised")
    if mine.is_words and theirs.is_words and not mine.may_be_product:
        return Verdict(mine.letters == theirs.letters, "normalised")
    one, other = _values(mine), _values(theirs)
    return Verdict(False, "value") if one and other and differ(one, other) else None


def _values(answer: Canonical) -> Values | None:
    if answer.number and not answer.number.percent:
        try:
            return Values((complex(answer.number.value),))
        except OverflowError:  # beyond what floats hold; algebra has numbers of any size
            return None
    return read_values(answer.body) if answer.is_formula else None
