"""The task: solve `a x² + b x + d = c (mod 13)`, or the easy `a x + d = c (mod 13)`.

Three choices make it learnable from scratch within about two hundred steps (measured):
- Every number is a word that includes its role (`+5x`, `ax=2`, `found=7`): a small model learns tables over
  typed words, but hardly ever over bare digits. A bare integer is always the final answer.
- Each word follows from the previous word and one other: the quadratic is evaluated by Horner's rule, as
  `(a x + b) x`. With separate `a x²` and `b x` the second product needs two look-ups, and its accuracy stayed
  at chance for twice as long.
- The prompt ends with the right side, so that `need`, which is `c - d`, follows by the same rule.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from typing import Literal

MODULUS = 13
Difficulty = Literal["easy", "hard"]


@dataclass(frozen=True, slots=True)
class Congruence:
    """`a x² + b x + d = c (mod 13)`; the easy kind is `a x + d = c`, with b = 0."""

    kind: Difficulty
    a: int
    b: int
    d: int
    c: int

    def __post_init__(self) -> None:
        assert all(0 <= n < MODULUS for n in (self.a, self.b, self.d, self.c)), self
        assert self.a and (self.kind == "hard" or not self.b), self

    @property
    def need(self) -> int:
        """The right side minus the constant: the value that `left` must have."""
        return (self.c - self.d) % MODULUS

    def left(self, x: int) -> int:
        """Returns `(a x + b) x` modulo 13, or `a x` for the easy kind."""
        inner = self.a * x + self.b
        return (inner * x if self.kind == "hard" else inner) % MODULUS

    @property
    def roots(self) -> tuple[int, ...]:
        """All solutions in 0..12, ascending: at most two; exactly one for the easy kind."""
        return tuple(x for x in range(MODULUS) if self.left(x) == self.need)

    @property
    def question(self) -> str:
        """For example `Solve mod 13: 3x² +5x +4 =7`, or `Solve mod 13: 3x +4 =7`."""
        unknown = f"{self.a}x² +{self.b}x" if self.kind == "hard" else f"{self.a}x"
        return f"Solve mod {MODULUS}: {unknown} +{self.d} ={self.c}"

    def attempt(self, x: int) -> list[str]:
        """Returns the words that test a value step by step; they end with the verdict `ok` or `no`."""
        ax = self.a * x % MODULUS
        verdict = "ok" if self.left(x) == self.need else "no"
        if self.kind == "easy":
            return [f"x={x}", f"ax={ax}", verdict]
        inner = (ax + self.b) % MODULUS
        return [f"x={x}", f"ax={ax}", f"ax+b={inner}", f"s={self.left(x)}", verdict]


def vocabulary() -> list[str]:
    """Returns every word of problems and traces, except the tags."""
    residues = range(MODULUS)
    roles = ("+{}x", "+{}", "={}", "need={}", "x={}", "ax={}", "ax+b={}", "s={}", "found={}")
    words = ["Solve", "mod", f"{MODULUS}:", "ok", "no", "none", "Final", "Answer:"]
    words += [f"{n}{power}" for power in ("x", "x²") for n in residues[1:]]
    words += [role.format(n) for role in (*roles, "{}") for n in residues]
    return words


HELD_OUT = {"easy": 39, "hard": 46}


@cache
def reduced_forms(kind: Difficulty, held_out: bool) -> tuple[Congruence, ...]:
    """Returns all solvable problems with d = 0 on one side of the split, in a fixed order."""
    return tuple(form for form in _solvable(kind) if is_held_out(form) == held_out)


def is_held_out(congruence: Congruence) -> bool:
    """Returns whether a problem belongs to the evaluation split, independent of its constant."""
    return _identity(congruence) in _held_out_identities(congruence.kind)


@cache
def _solvable(kind: Difficulty) -> tuple[Congruence, ...]:
    forms = (
        Congruence(kind, a, b, 0, need)
        for a in range(1, MODULUS)
        for b in (range(MODULUS) if kind == "hard" else (0,))
        for need in range(MODULUS)
    )
    return tuple(form for form in forms if form.roots)


def _identity(congruence: Congruence) -> tuple[int, int]:
    if congruence.kind == "easy":
        return congruence.a, congruence.need
    inverse = pow(congruence.a, -1, MODULUS)
    return congruence.b * inverse % MODULUS, congruence.need * inverse % MODULUS


@cache
def _held_out_identities(kind: Difficulty) -> frozenset[tuple[int, int]]:
    identities = {_identity(form) for form in _solvable(kind)}
    ranked = sorted(identities, key=lambda pair: hashlib.sha256(f"{kind}{pair}".encode()).digest())
    return frozenset(ranked[: HELD_OUT[kind]])
