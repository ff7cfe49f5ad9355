r"""Evaluates formulas at one point in floating point, which can prove two answers different, never equal.

Each letter stands for a fixed number, the same in both answers, so formulas that differ there are different.
Ambiguous notation (functions, units, factorials, bases, mixed numbers inside a formula) has no value, and
algebra decides. Bounded time and depth for any text.
"""

from __future__ import annotations

import cmath
import math
import re
from collections.abc import Sequence
from string import ascii_lowercase

MAX_CHARS = 200
MAX_DEPTH = 12
MAX_EXPONENT = 1000
MAX_TERM = 1e9
"""A larger term of a sum would absorb the others by rounding."""

CANCELLED = 1e-9
"""A sum that is smaller than its terms by this factor is mostly rounding."""

TOLERANCE = 1e-4
"""Relative and far above rounding: what is nearer is for algebra to decide."""

_SPECIAL = {r"\pi": math.pi, r"\infty": 1e30, "i": 1j, "e": math.e}
_GREEK = ("alpha", "beta", "gamma", "delta", "theta", "lambda", "mu", "rho", "sigma", "tau", "phi", "omega")
_COMMANDS = ("frac", "sqrt", "cdot", "times", "div", "pi", "infty", *_GREEK)
_TOKEN = re.compile(
    r"(?P<number>\d+(?:\.\d+)?|\.\d+)"
    r"|(?P<letters>[A-Za-z]{1,2}(?![A-Za-z]))"
    rf"|(?P<command>\\(?:{'|'.join(_COMMANDS)})(?![A-Za-z]))"
    r"|(?P<mark>[-+*/^(){}\[\]])"
    r"|(?P<blank>\s+)"
)
_WORDS = frozenset(
    {"am", "cm", "ft", "hr", "in", "is", "kg", "km", "lb", "mi", "mm", "no", "or", "oz", "pm", "to"}
)
_THOUSANDS = re.compile(r"\d,\d{3}(?!\d)")  # one number or two
_MAYBE_UNIT = re.compile(r"(?<=[\d})])\s?[ghlmsJLNVW]$")  # `2s` may be two seconds
_CLOSE = {"(": ")", "{": "}"}


class _Unreadable(Exception):
    """The formula has notation that this module does not evaluate."""


def differ(left: complex, right: complex) -> bool:
    """Returns whether two values certainly differ. False: they may be equal."""
    return abs(left - right) > TOLERANCE * max(abs(left), abs(right))


def read_value(body: str) -> complex | None:
    """Reads the value of a canonical body; None if any part is ambiguous."""
    if len(body) > MAX_CHARS or _THOUSANDS.search(body) or _MAYBE_UNIT.search(body):
        return None
    try:
        value = _FormulaReader(_tokens(body)).single()
    except (_Unreadable, ZeroDivisionError, OverflowError):
        return None
    return value if cmath.isfinite(value) else None


def _tokens(body: str) -> list[str]:
    tokens: list[str] = []
    end = 0
    while end < len(body):
        match = _TOKEN.match(body, end)
        if not match or match["letters"] in _WORDS:
            raise _Unreadable
        end = match.end()
        if match["letters"]:
            tokens += match["letters"]
        elif not match["blank"]:
            tokens.append(match[0])
    return tokens


class _FormulaReader:
    """Recursive descent over the tokens of one answer."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self._tokens = [*tokens, ""]
        self._at = 0
        self._depth = 0

    def single(self) -> complex:
        """Reads all tokens as one formula."""
        value = self._sum()
        if self._next:
            raise _Unreadable
        return value

    @property
    def _next(self) -> str:
        return self._tokens[self._at]

    def _take(self, expected: str | None = None) -> str:
        token = self._next
        if token == "" or (expected is not None and token != expected):
            raise _Unreadable
        self._at += 1
        return token

    def _sum(self) -> complex:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _Unreadable
        terms = [self._signed()]
        while self._next in ("+", "-"):
            terms.append(self._signed())
        self._depth -= 1
        total, largest = sum(terms), max(map(abs, terms))
        if len(terms) > 1 and (largest > MAX_TERM or abs(total) < CANCELLED * largest):
            raise _Unreadable
        return total

    def _signed(self) -> complex:
        if self._next in ("+", "-") and self._take() == "-":
            return -self._product()
        return self._product()

    def _product(self) -> complex:
        value = self._power()
        while True:
            if self._next in (r"\cdot", r"\times", "*"):
                self._take()
                value *= self._power()
            elif self._next in ("/", r"\div"):
                self._take()
                value /= self._power()
                if self._begins_factor():  # `1/2x` is ambiguous
                    raise _Unreadable
            elif self._begins_factor():
                before = self._tokens[self._at - 1]
                if _is_number(self._next) or (self._next == r"\frac" and _is_number(before)):
                    raise _Unreadable  # `3 4`, `1\frac{1}{2}`
                value *= self._power()
            else:
                return value

    def _begins_factor(self) -> bool:
        token = self._next
        return token in ("(", "{", r"\frac", r"\sqrt") or token in _NAMES or _is_number(token)

    def _power(self) -> complex:
        value = self._atom()
        if self._next != "^":
            return value
        self._take()
        exponent = self._atom() if self._next == "{" else _value_of(self._take())
        root_of_negative = value.real < 0 and exponent != round(exponent.real)
        if self._next == "^" or abs(exponent) > MAX_EXPONENT or root_of_negative:
            raise _Unreadable
        return value**exponent

    def _atom(self) -> complex:
        token = self._take()
        if token in ("(", "{"):
            value = self._sum()
            self._take(_CLOSE[token])
            return value
        if token == r"\frac":
            return self._argument() / self._argument()
        if token == r"\sqrt":
            degree = complex(2)
            if self._next == "[":
                self._take()
                degree = self._sum()
                self._take("]")
            radicand = self._argument()
            if radicand.imag or (radicand.real < 0 and degree != 2):  # which root is meant?
                raise _Unreadable
            return radicand ** (1 / degree)
        return _value_of(token)

    def _argument(self) -> complex:
        if self._next != "{":
            raise _Unreadable
        return self._atom()


def _is_number(token: str) -> bool:
    return token[:1].isdigit() or token[:1] == "."


def _value_of(token: str) -> complex:
    if _is_number(token):
        return complex(float(token))
    if token not in _NAMES:
        raise _Unreadable
    return _NAMES[token]


def _names() -> dict[str, complex]:
    """Returns a number in 1..2 for each letter; irrational steps avoid coincidences and simple relations.

    A capital has the number of its small letter, since math-verify does not distinguish them.
    """
    golden = (math.sqrt(5) - 1) / 2
    names = [*ascii_lowercase, *("\\" + name for name in _GREEK)]
    values = {name: complex(1 + (golden * place**1.5) % 1) for place, name in enumerate(names, start=1)}
    values |= {name: complex(value) for name, value in _SPECIAL.items()}
    return values | {name.upper(): values[name] for name in ascii_lowercase}


_NAMES = _names()
