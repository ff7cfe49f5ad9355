"""Decides equality without algebra: equal text, equal spelling, exact numbers, clearly different values.

This decides every pair of plain numbers and most wrong formulas; `verifier.py` passes the rest to a worker
process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_parallel_r1.rewards.normalize import Canonical, canonical
from megatron_parallel_r1.rewards.number import read_number, same_number
from megatron_parallel_r1.rewards.numeric import Values, differ, read_values

MAX_CHARS = 1000
"""Longer text is compared literally; no useful answer is longer."""

VerdictReason = Literal[
    "empty", "text", "too long", "normalised", "number", "value", "algebra", "timeout", "crash"
]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether an answer is right, and the step that decided it."""

    correct: bool
    reason: VerdictReason


def decide_without_algebra(answer: str | None, reference: str) -> Verdict | None:
    """Decides a pair, or returns None where only algebra can. Bounded time for any input."""
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
        return _decide_formulas(canonical(answer), canonical(reference))
    return Verdict(same_number(left, right), "number")


def _decide_formulas(answer: Canonical, reference: Canonical) -> Verdict | None:
    if answer.name and reference.name and answer.name != reference.name:
        return None
    if answer.body == reference.body and answer.body:
        return Verdict(True, "normalised")
    left, right = answer.number, reference.number
    if left and right:
        return Verdict(same_number(left, right), "number")
    if (left and reference.is_words) or (right and answer.is_words):
        return Verdict(False, "normalised")
    if answer.is_words and reference.is_words and not answer.may_be_product:
        return Verdict(answer.letters == reference.letters, "normalised")
    answer_values, reference_values = _values(answer), _values(reference)
    if answer_values and reference_values and differ(answer_values, reference_values):
        return Verdict(False, "value")
    return None


def _values(answer: Canonical) -> Values | None:
    if answer.number and not answer.number.percent:
        try:
            return Values((complex(answer.number.value),))
        except OverflowError:  # beyond the range of floats; algebra has integers of any size
            return None
    return read_values(answer.body) if answer.is_formula else None
