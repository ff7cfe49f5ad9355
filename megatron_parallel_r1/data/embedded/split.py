"""Which problems are held out for evaluation, by construction.

A hard problem keeps its solutions when the constant moves over (only `need` = c - d counts) and when
both sides are scaled, so it is judged by its monic form `x² + (b/a) x = need/a`: there are 91 solvable
ones, and 46 of them, with all their scalings and constants, are held out. No evaluation problem then
equals a training problem in any disguise. The monic form of an easy problem is its solution itself, so
there the pair (a, need) decides: a quarter of the 156 pairs is held out.
"""

from __future__ import annotations

import hashlib
from functools import cache

from megatron_parallel_r1.data.embedded.congruence import MODULUS, Congruence, Kind

HELD_OUT = {"easy": 39, "hard": 46}


@cache
def reduced_forms(kind: Kind, held_out: bool) -> tuple[Congruence, ...]:
    """All solvable problems without a constant (d = 0) on one side of the split, in a fixed order."""
    return tuple(form for form in _solvable(kind) if is_held_out(form) == held_out)


def is_held_out(congruence: Congruence) -> bool:
    """Whether a problem belongs to the evaluation side, whatever its constant."""
    return _identity(congruence) in _held_out_identities(congruence.kind)


@cache
def _solvable(kind: Kind) -> tuple[Congruence, ...]:
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
def _held_out_identities(kind: Kind) -> frozenset[tuple[int, int]]:
    identities = {_identity(form) for form in _solvable(kind)}
    ranked = sorted(identities, key=lambda pair: hashlib.sha256(f"{kind}{pair}".encode()).digest())
    return frozenset(ranked[: HELD_OUT[kind]])
