"""Decides equality in a fixed order: equal text, equal spelling, numbers and units, parts, different values.

This decides every pair of plain numbers and most wrong formulas; `verifier.py` passes the rest to a worker
process, which takes the same steps and compares single formulas by algebra last. Where unsure, an answer is
wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from megatron_parallel_r1.rewards.normalize import Canonical, canonical
from megatron_parallel_r1.rewards.number import Number, read_number, same_number
from megatron_parallel_r1.rewards.numeric import differ, read_value
from megatron_parallel_r1.rewards.structure import OR, every, read_parts, same_parts
from megatron_parallel_r1.rewards.units import CHANGES
from megatron_parallel_r1.utils.latex import HEDGES, NAME

MAX_CHARS = 1000
"""Longer text is compared literally; no useful answer is longer."""

MAX_DEPTH = 4
"""Of answers within answers."""

MAX_SIDES = 8
"""Of a chain of equations."""

_NAME = re.compile(rf"(?:{NAME})(?:\([a-z]\))?|[A-Z]{{2,3}}")
_BASE = re.compile(r"(?P<digits>[0-9A-Za-z]*\d[0-9A-Za-z]*)_\{?(?P<base>\d{1,2})\}?")
_TIME = re.compile(r"(?P<hour>\d{1,2})(?::(?P<minute>\d\d))?(?:(?P<half>[ap])\.?m\.?)?")
_OPTION = re.compile(r"(?P<only>[A-Ja-j])|\(?(?P<letter>[A-Ja-j])(?:\):?|[:.])(?P<text>.*)")
_OTHER_OPTION = re.compile(
    rf"(?<![A-Za-z])(?:[A-J][).:]|(?i:{'|'.join(HEDGES)}|and|also|not|wrong|incorrect)(?![A-Za-z]))"
    r"|^\(?[A-Za-z](?:\)?$|:)"
)
_LETTER = r"(?:[A-J]|(?<![A-Za-z])[a-j](?![A-Za-z]))"
_ONLY_OPTIONS = re.compile(rf"(?:[^A-Za-z0-9]|{_LETTER})+")
_FOREIGN = re.compile(r"[^\w\\{}()\[\]+*/^=<>.,|!& -]|[^\x00-\x7f]")
_LETTERS = re.compile(r"\\([A-Za-z]+)|([A-Za-z]{2,})")
_NO_PRODUCT = CHANGES | set(["at", "for", "in", "inf", "nan", "of", "pm", "sec", "so", "the", "we"])
_COMMANDS_TEXT = """
frac sqrt cdot times div pi infty binom sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln
exp lfloor rfloor lceil rceil le ge ne cup cap emptyset pm mp begin end overline bar circ sum prod gcd max
min setminus alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau phi chi
psi omega varphi Delta Gamma Omega lvert rvert mid vert dot
"""
_COMMANDS = frozenset(_COMMANDS_TEXT.split())

Algebra = Callable[[str, str], bool]
Same = Callable[[str, str], bool | None]
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
    left, right = (read_number(text.replace(r"\dfrac", r"\frac")) for text in (answer, reference))
    if left and right:
        return Verdict(same_number(left, right), "number")
    return _decide(answer, reference, None, 0)


def decide(answer: str, reference: str, algebra: Algebra) -> bool:
    """Decides a pair that `decide_without_algebra` leaves open."""
    verdict = _decide(answer, reference, algebra, 0)
    return verdict is not None and verdict.correct


def _decide(answer: str, reference: str, algebra: Algebra | None, depth: int) -> Verdict | None:
    if answer == reference:
        return Verdict(True, "text")
    left, right = _canonical(answer), _canonical(reference)
    if (left.unit is None) != (right.unit is None):
        left, right = _canonical(answer, right.unit is not None), _canonical(reference, left.unit is not None)
    if left.name and right.name and left.name != right.name:
        if left.number or right.number:
            return Verdict(False, "normalised")
        return _decide_formulas(left, right, algebra)
    if left.unit and right.unit and left.unit != right.unit:
        return Verdict(_same_measure(left, right), "number")
    if left.body == right.body and left.body:
        return Verdict(True, "normalised")
    if left.number and right.number:
        return Verdict(same_number(left.number, right.number), "number")
    for rule in (_in_bases, _at_times, _as_words):
        if (correct := rule(left, right)) is not None:
            return Verdict(correct, "normalised")
    if depth == MAX_DEPTH:
        return Verdict(False, "value")

    def same(part: str, other: str) -> bool | None:
        verdict = _decide(part, other, algebra, depth + 1)
        return verdict.correct if verdict else None

    for rule_of_parts in (_as_options, _in_parts, _in_chains):
        decided, correct = rule_of_parts(left, right, same)
        if decided:
            return None if correct is None else Verdict(correct, "value")
    return _decide_formulas(left, right, algebra)


def _decide_formulas(left: Canonical, right: Canonical, algebra: Algebra | None) -> Verdict | None:
    are_equations = _is_equation(left) and _is_equation(right)
    this, other = _value(left), _value(right)
    if not are_equations and this is not None and other is not None and differ(this, other):
        return Verdict(False, "value")
    if not (_is_formula(left) and _is_formula(right)):
        return Verdict(False, "normalised")
    if algebra is None:
        return None
    names = [f"{side.name}=" if are_equations and side.name else "" for side in (left, right)]
    return Verdict(algebra(names[0] + left.body, names[1] + right.body), "algebra")


_canonical = lru_cache(maxsize=2048)(canonical)  # the samples of a problem share its reference


def _same_measure(left: Canonical, right: Canonical) -> bool:
    assert left.unit and right.unit
    if left.unit.powers != right.unit.powers or not (left.number and right.number):
        return False
    scaled = Number(left.number.value * left.unit.size / right.unit.size, left.number.percent, 0)
    return same_number(scaled, right.number)


def _in_bases(answer: Canonical, reference: Canonical) -> bool | None:
    """`1101_2` is 13; answers often omit the base of the reference, but none invents one."""
    left, right = _in_base(answer.body), _in_base(reference.body)
    if left is None and right is None:
        return None
    if left is not None and right is not None:
        return left == right
    if right is not None:
        digits = reference.body.partition("_")[0]
        return answer.body == digits or (answer.number is not None and answer.number.value == right)
    return reference.number is not None and reference.number.value == left


def _in_base(body: str) -> int | None:
    if not (found := _BASE.fullmatch(body)):
        return None
    try:
        return int(found["digits"], int(found["base"]))
    except ValueError:
        return None


def _at_times(answer: Canonical, reference: Canonical) -> bool | None:
    left, right = (_TIME.fullmatch(side.body.casefold()) for side in (answer, reference))
    if not left or not right or not (left["half"] or right["half"]):
        return None
    halves = {left["half"], right["half"]} - {None}
    return len(halves) == 1 and all(int(left[key] or 0) == int(right[key] or 0) for key in ("hour", "minute"))


def _as_words(answer: Canonical, reference: Canonical) -> bool | None:
    if (answer.number and reference.is_words) or (reference.number and answer.is_words):
        return False
    if answer.is_words and reference.is_words and not answer.may_be_product:
        return answer.letters == reference.letters
    return None


def _as_options(left: Canonical, right: Canonical, same: Same) -> tuple[bool, bool | None]:
    """Compares `B`, `(B)12` and `B:12` by their letters, and by their texts where both have one."""
    this, other = _option(left.body), _option(right.body)
    if not this or not other:
        return False, None
    texts = this[1] and other[1]
    return True, this[0] == other[0] and (not texts or same(this[1], other[1]))


def _option(body: str) -> tuple[str, str] | None:
    found = _OPTION.fullmatch(body)
    text = (found["text"] or "") if found else ""
    if not found or _OTHER_OPTION.search(text) or _ONLY_OPTIONS.fullmatch(text):
        return None
    return (found["letter"] or found["only"]).upper(), text


def _in_parts(left: Canonical, right: Canonical, same: Same) -> tuple[bool, bool | None]:
    """Compares lists, tuples, sets, intervals and matrices by their parts; algebra merges unions."""
    this, other = (None if side.number else read_parts(side.body) for side in (left, right))
    if this and other:
        correct = same_parts(this, other, same)
        return correct is not None or "union" not in (this.kind, other.kind), correct
    if not (parts := this or other):
        return False, None
    if parts is this and parts.kind == "list" and OR.search(left.body):  # spellings of one answer
        return True, every(same(item, right.body) for item in parts.items)
    if len(parts.items) == 1:  # a set
        return True, same(parts.items[0], right.body) if this else same(left.body, parts.items[0])
    return True, False


def _in_chains(left: Canonical, right: Canonical, same: Same) -> tuple[bool, bool | None]:
    """Compares each side of `6*7=42` with an answer that is no equation."""
    if (_is_equation(left) and _is_equation(right)) or not ("=" in left.body or "=" in right.body):
        return False, None
    chain = left if "=" in left.body else right
    sides = [side for side in chain.body.split("=") if not _NAME.fullmatch(side)]
    if not 0 < len(sides) <= MAX_SIDES:
        return True, False
    return True, every(same(side, right.body) if chain is left else same(left.body, side) for side in sides)


def _is_equation(side: Canonical) -> bool:
    return bool(side.name) or "=" in side.body


def _value(side: Canonical) -> complex | None:
    if side.number and not side.number.percent:
        try:
            return complex(side.number.value)
        except OverflowError:  # beyond the range of floats; algebra has integers of any size
            return None
    return None if side.has_words else read_value(side.body)


def _is_formula(side: Canonical) -> bool:
    """Whether algebra may read the body: it would take words for products of letters."""
    if (side.has_words and not side.number) or _FOREIGN.search(side.body):
        return False
    for command, letters in _LETTERS.findall(side.body):
        if command and command not in _COMMANDS:
            return False
        if letters and (len(letters) > 3 or letters.lower() in _NO_PRODUCT):
            return False
    names = set(_LETTERS.sub(r"\2", side.body))  # sympy gets `R` and `r` as one letter
    return not any(name.isupper() and name.lower() in names for name in names)
