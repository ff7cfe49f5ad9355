"""Decides equality of single formulas with sympy, for which math-verify reads the LaTeX, in a worker process.

Equal means equal to 200 digits and in sign: for formulas without letters their values, for others their
values at several points, for equations and inequalities both up to a factor. math-verify's own comparison
rounds to six places and takes what is below 1e-15 for 0.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache

import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse
from sympy import Basic, Expr, Float, I, MatrixBase, Rational
from sympy.core.relational import Relational

from megatron_parallel_r1.rewards.number import read_number, rounding

DIGITS = 200
POINTS = 6

_LATEX = [
    LatexExtractionConfig(
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
        )
    )
]
_DEGREES = re.compile(r"(\d+(?:\.\d+)?)\^\{?\\circ\}?")
_LOG_E = re.compile(r"\\log_\{?e\}?")
_LESS = {"<": 1, "<=": 1, ">": -1, ">=": -1}


def equal(answer: str, reference: str) -> bool:
    """Compares two canonical bodies of formulas. Takes any time and memory; raises whatever sympy raises."""
    left, right = _read(answer), _read(reference)
    if left is None or right is None:
        return False
    numbers = [number for number in map(read_number, (answer, reference)) if number]
    return _same(left, right, max((rounding(number) for number in numbers), default=Fraction(0)))


@lru_cache(maxsize=256)  # the samples of a problem share its reference
def _read(text: str) -> Basic | MatrixBase | None:
    text = _LOG_E.sub(r"\\ln ", _DEGREES.sub(r"\\frac{\1\\pi}{180}", text))
    # Time-outs of math-verify are signal handlers, which wait for the interpreter: disabled.
    read = next(iter(parse(f"${text}$", _LATEX, parsing_timeout=None)), None)
    if not isinstance(read, (Basic, MatrixBase)):
        return None
    exact = {number: Rational(str(number)) for number in read.atoms(Float)}
    imaginary = {symbol: I for symbol in read.free_symbols if symbol.name == "i"}
    return read.subs({**exact, **imaginary}) if exact or imaginary else read


def _same(left: Basic | MatrixBase, right: Basic | MatrixBase, off: Fraction) -> bool:
    if left == right:
        return left not in (sympy.true, sympy.false, sympy.nan)
    if isinstance(left, Relational) and isinstance(right, Relational):
        return _same_relation(left, right)
    left, right = left.doit(), right.doit()
    if isinstance(left, MatrixBase) and isinstance(right, MatrixBase):
        return left.shape == right.shape and all(
            _same(*pair, off) for pair in zip(left.flat(), right.flat(), strict=True)
        )
    if not isinstance(left, Expr) or not isinstance(right, Expr):
        return left == right
    points = _points(left, right)
    return all(_same_value(_at(left, point), _at(right, point), off) for point in points)


def _same_relation(left: Relational, right: Relational) -> bool:
    """Compares `a = b` and `c = d` by whether `a - b` and `c - d` have a constant ratio, positive for `<`."""
    strict = {"<": "<", ">": "<", "<=": "<=", ">=": "<="}
    if strict.get(left.rel_op, left.rel_op) != strict.get(right.rel_op, right.rel_op):
        return False
    this, other = (_LESS.get(side.rel_op, 1) * (side.lhs - side.rhs) for side in (left, right))
    if not this.free_symbols or not other.free_symbols:
        return False
    first, *_ = points = _points(this, other)
    ratio = _at(other, first) / _at(this, first)
    if ratio.is_zero is not False or not ratio.is_finite or (left.rel_op in _LESS and not ratio.is_positive):
        return False
    return all(_same_value(ratio * _at(this, point), _at(other, point), Fraction(0)) for point in points[1:])


def _points(left: Expr, right: Expr) -> list[dict[str, Rational]]:
    """Returns fixed values, of both signs, for the letters; one empty point where there are none."""
    names = sorted({symbol.name for symbol in left.free_symbols | right.free_symbols})
    if not names:
        return [{}]
    return [
        {
            name: Rational(
                (-1) ** (point + place * (1 + point // 2)) * (7 * point + 11 + 13 * place), 10 + 3 * place
            )
            for place, name in enumerate(names)
        }
        for point in range(POINTS)
    ]


def _at(formula: Expr, point: dict[str, Rational]) -> Expr:
    return formula.subs({symbol: point[symbol.name] for symbol in formula.free_symbols}).doit()


def _same_value(left: Expr, right: Expr, off: Fraction) -> bool:
    if left == right:
        return left is not sympy.nan and not left.has(sympy.zoo)
    if not (left.is_number and right.is_number) or left.is_finite is False or right.is_finite is False:
        return False
    if left.is_Rational and right.is_Rational:
        return bool(abs(left - right) <= Rational(off.numerator, off.denominator))
    this, other = left.evalf(DIGITS), right.evalf(DIGITS)
    largest = max(abs(this), abs(other))
    return bool(
        abs(this - other)
        <= max(Rational(off.numerator, off.denominator), largest * Rational(1, 10 ** (DIGITS - 50)))
    )
