r"""Exact plain numbers: integers, decimals (also repeating), fractions, mixed numbers, powers of ten.

Numbers that this module reads never reach the computer algebra system.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 400
"""Longer numbers are compared as text: converting digits takes quadratic time."""

ROUNDED_PLACES, ROUNDED_DIGITS = 6, 5
"""A decimal with this many places and significant digits may stand for the exact number that it rounds."""

FLOAT_DIGITS = 15
"""A decimal with this many digits may be the output of a program, with the rounding of a double."""

_PLAIN = r"(?:\d{1,3}(?:[, ]\d{3})+(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)"
_SIGN = r"[-+]?"
_NUMBER = re.compile(
    rf"(?P<sign>{_SIGN})(?:"
    rf"(?P<whole>\d+) ?\\frac\{{(?P<mixed_top>\d+)\}}\{{(?P<mixed_bottom>\d+)\}}"
    rf"|(?P<words>\d+) (?P<words_top>\d+)/(?P<words_bottom>\d+)"
    rf"|\\frac\{{(?P<top>{_SIGN}{_PLAIN})\}}\{{(?P<bottom>{_SIGN}{_PLAIN})\}}"
    rf"|(?P<left>{_PLAIN})[/:](?P<right>{_SIGN}{_PLAIN})"
    rf"|(?:(?P<mantissa>{_PLAIN})(?:\\times|\\cdot|\*))?10\^(?:\{{(?P<power>{_SIGN}\d{{1,3}})\}}|(?P<digit>-?\d))"
    r"|(?P<fixed>\d*\.\d*)\\(?:overline|bar|dot)\{(?P<repeated>\d+)\}"
    rf"|(?P<plain>{_PLAIN})"
    r") ?(?P<percent>%?)",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Number:
    """A written number.

    Attributes:
        value: the exact value before the percent sign: 40 for `40%`.
        percent: whether a percent sign follows.
        places: digits after the decimal point, 0 for anything but a decimal; `1.5\\times10^{-3}` has four.
    """

    value: Fraction
    percent: bool
    places: int


def read_number(text: str) -> Number | None:
    r"""Reads `-12`, `1,080.50`, `3/4`, `\frac{3}{4}`, `1 1/2`, `1\frac{1}{2}`, `0.1\overline{6}`, `40%`,
    `2\cdot10^{3}`.

    Returns None for anything else. `text` is stripped and its fractions have braces.
    """
    if text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS:
        return Number(Fraction(int(text)), False, 0)
    if len(text) > MAX_DIGITS or not (match := _NUMBER.fullmatch(text)):
        return None
    part = match.groupdict()
    places = 0
    try:
        if part["plain"]:
            value = _fraction(part["plain"])
            places = len(part["plain"].partition(".")[2])
        elif part["repeated"]:
            value = _repeating(part["fixed"], part["repeated"])
        elif power := part["power"] or part["digit"]:
            mantissa = part["mantissa"] or "1"
            value = _fraction(mantissa) * Fraction(10) ** int(power)
            places = max(0, len(mantissa.partition(".")[2]) - int(power)) if "." in mantissa else 0
        elif part["whole"] or part["words"]:
            kind = "mixed" if part["whole"] else "words"
            share = Fraction(int(part[f"{kind}_top"]), int(part[f"{kind}_bottom"]))
            if share >= 1:  # `2\frac{3}{2}` would be a product
                return None
            value = int(part["whole"] or part["words"]) + share
        else:
            value = _fraction(part["top"] or part["left"]) / _fraction(part["bottom"] or part["right"])
    except ZeroDivisionError:
        return None
    return Number(-value if part["sign"] == "-" else value, bool(part["percent"]), places)


def same_number(answer: Number, reference: Number) -> bool:
    """Returns whether two numbers have the same value.

    `40%` equals both `40` and `0.4`: data sets leave the sign to the question. A decimal of six places and
    five significant digits equals the number that it correctly rounds: `0.333333` is `1/3`, but `0.333` is
    not, nor is `0.666666` `2/3`; one of more places may also be truncated, and `3.3000000000000003` is `3.3`.
    This holds for answer and reference alike.
    """
    if answer.value == reference.value:
        return True
    if (answer.places or reference.places) and (
        _stands_for(answer, reference) or _stands_for(reference, answer)
    ):
        return True
    if answer.percent == reference.percent:
        return False
    percent, plain = (answer, reference) if answer.percent else (reference, answer)
    return percent.value == plain.value * 100


def rounding(number: Number) -> Fraction:
    """Returns how far a rounded decimal may be from the number that it stands for; 0 for an exact number."""
    if number.places < ROUNDED_PLACES or abs(number.value) * 10**number.places < 10 ** (ROUNDED_DIGITS - 1):
        return Fraction(0)
    return Fraction(1 if number.places > ROUNDED_PLACES else Fraction(1, 2)) / 10**number.places


def _stands_for(number: Number, exact: Number) -> bool:
    off = abs(number.value - exact.value)
    scaled = abs(number.value) * 10**number.places
    if number.places and scaled >= 10 ** (FLOAT_DIGITS - 1) and exact.places < FLOAT_DIGITS - 2:
        return off * 2**50 <= abs(exact.value)
    unit, half = rounding(number), Fraction(1, 2) / 10**number.places
    return off < unit or (unit > 0 and off == half)


def _repeating(fixed: str, repeated: str) -> Fraction:
    """`0.1` and `6` are 0.1666…"""
    places = len(fixed.partition(".")[2])
    tail = Fraction(int(repeated), 10**places * (10 ** len(repeated) - 1))
    return Fraction(fixed + "0") + tail  # a bare `.` is 0


def _fraction(digits: str) -> Fraction:
    return Fraction(digits.replace(",", "").replace(" ", ""))
