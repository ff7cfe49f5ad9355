r"""Plain numbers, exactly: integers, decimals, fractions, mixed numbers, percentages.

What this module reads never reaches a computer algebra system.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 400
"""Longer ones are compared as text: converting digits takes quadratic time."""

ROUNDED_DIGITS = 6
"""A decimal with this many places or more may stand for the number that it rounds."""

_PLAIN = r"(?:\d{1,3}(?:[, ]\d{3})+(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)"
_SIGN = r"[-+]?"
_NUMBER = re.compile(
    rf"(?P<sign>{_SIGN})(?:"
    rf"(?P<whole>\d+) ?\\frac\{{(?P<mixed_top>\d+)\}}\{{(?P<mixed_bottom>\d+)\}}"
    rf"|(?P<words>\d+) (?P<words_top>\d+)/(?P<words_bottom>\d+)"
    rf"|\\frac\{{(?P<top>{_SIGN}{_PLAIN})\}}\{{(?P<bottom>{_SIGN}{_PLAIN})\}}"
    rf"|(?P<left>{_PLAIN})/(?P<right>{_SIGN}{_PLAIN})"
    rf"|(?P<plain>{_PLAIN})"
    r") ?(?P<percent>%?)",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Number:
    """A number as it was written.

    Attributes:
        value: exact, before the percent sign: 40 for `40%`.
        percent: a percent sign follows.
        places: digits after the point of a decimal, 0 for anything else.
    """

    value: Fraction
    percent: bool
    places: int


def read_number(text: str) -> Number | None:
    r"""Reads `-12`, `1,080.50`, `3/4`, `\frac{3}{4}`, `1 1/2`, `1\frac{1}{2}`, `40%`; else None.

    `text` has no blanks around it, and its fractions are braced.
    """
    if len(text) > MAX_DIGITS or not (match := _NUMBER.fullmatch(text)):
        return None
    part = match.groupdict()
    places = 0
    try:
        if part["plain"]:
            value = _fraction(part["plain"])
            places = len(part["plain"].partition(".")[2])
        elif part["whole"] or part["words"]:
            kind = "mixed" if part["whole"] else "words"
            share = Fraction(int(part[f"{kind}_top"]), int(part[f"{kind}_bottom"]))
            if share >= 1:  # `2\frac{3}{2}` is a product, if anything
                return None
            value = int(part["whole"] or part["words"]) + share
        else:
            value = _fraction(part["top"] or part["left"]) / _fraction(part["bottom"] or part["right"])
    except ZeroDivisionError:
        return None
    return Number(-value if part["sign"] == "-" else value, bool(part["percent"]), places)


def same_number(answer: Number, reference: Number) -> bool:
    """Whether an answer gives the reference's value.

    `40%` is the same as `40` and as `0.4`: data sets leave the sign to the question. A decimal of six
    places or more is the number that it correctly rounds, so `0.333333` is `1/3` and `0.333` is not.
    """
    if answer.percent == reference.percent:
        return _rounds_to(answer, answer.value, reference.value)
    scaled = Fraction(1, 100)
    return (
        _rounds_to(answer, answer.value, reference.value)
        or (answer.percent and answer.value * scaled == reference.value)
        or (reference.percent and answer.value == reference.value * scaled)
    )


def _rounds_to(answer: Number, value: Fraction, exact: Fraction) -> bool:
    if value == exact or value == 0 or answer.places < ROUNDED_DIGITS:
        return value == exact
    return abs(value - exact) * 2 <= Fraction(1, 10**answer.places)


def _fraction(digits: str) -> Fraction:
    return Fraction(digits.replace(",", "").replace(" ", ""))
