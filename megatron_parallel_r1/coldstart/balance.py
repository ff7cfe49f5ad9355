"""Which of the traces that pass make up the data set.

A trace's cell is (its blocks, the paths of its widest block). Two rules, in turn:

1. Each problem keeps min(per_problem, as many as it has). Which ones: those that make the cells as even as
   can be, in that no exchange of one chosen trace of a problem for another one of it lowers the sum over
   cells of count². (Exchanges of several at once might; finding those is not worth a flow solver.)
2. With counts n_k of the cells that occur, every cell is cut to the largest c for which

       max_k min(n_k, c)  <=  ratio * mean_k min(n_k, c)

   The left side over the mean never falls as c grows, so c is well defined, and no other choice of that ratio
   keeps more traces: one whose fullest cell holds M has a mean of at most that under c = M.

Ties are broken by lot, and the lot is by the seed and the trace alone.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_parallel_r1.coldstart.checks import Shape
from megatron_parallel_r1.coldstart.settings import Balance

Cell = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A trace that passes: `sample` of problem number `problem`."""

    problem: int
    sample: int
    shape: Shape

    @property
    def cell(self) -> Cell:
        return self.shape.blocks, self.shape.widest


def balance(candidates: Sequence[Candidate], asked: Balance, seed: int) -> list[Candidate]:
    """The candidates that stay, by problem and sample; whatever the order in which they are given."""
    ordered = sorted(candidates, key=lambda one: (one.problem, one.sample))
    chosen = _per_problem(ordered, asked.per_problem)
    if asked.ratio is not None:
        chosen = _evened(chosen, asked.ratio, seed)
    return sorted(chosen, key=lambda one: (one.problem, one.sample))


def largest_cap(counts: Mapping[Cell, int], ratio: float) -> int:
    """The c of rule 2; 0 where nothing is to be capped."""
    cap = 0
    for tried in range(1, max(counts.values(), default=0) + 1):
        total = sum(min(count, tried) for count in counts.values())
        if tried * len(counts) > ratio * total:
            break
        cap = tried
    return cap


def _per_problem(ordered: Sequence[Candidate], most: int) -> list[Candidate]:
    """Rule 1: each problem's first ones, and then exchanges for as long as one lowers the sum of squares."""
    of_problem: defaultdict[int, list[Candidate]] = defaultdict(list)
    for one in ordered:
        of_problem[one.problem].append(one)
    inside = [group[:most] for group in of_problem.values()]
    outside = [group[most:] for group in of_problem.values()]
    counts = Counter(one.cell for group in inside for one in group)
    moved = True
    while moved:  # every exchange lowers a sum of squares of whole numbers, so this ends
        moved = any([_exchange(*groups, counts) for groups in zip(inside, outside, strict=True)])
    return [one for group in inside for one in group]


def _exchange(inside: list[Candidate], outside: list[Candidate], counts: Counter[Cell]) -> bool:
    """Makes the best exchange within one problem; False if none lowers the sum of squares.

    One from a cell of a traces to a cell of b changes it by 2 (b - a + 1).
    """
    if not outside:
        return False
    leaves = max(range(len(inside)), key=lambda i: (counts[inside[i].cell], -i))
    comes = min(range(len(outside)), key=lambda i: (counts[outside[i].cell], i))
    if counts[outside[comes].cell] + 1 >= counts[inside[leaves].cell]:
        return False
    counts[inside[leaves].cell] -= 1
    counts[outside[comes].cell] += 1
    inside[leaves], outside[comes] = outside[comes], inside[leaves]
    return True


def _evened(chosen: Sequence[Candidate], ratio: float, seed: int) -> list[Candidate]:
    """Rule 2: of a cell that holds too many, lots are drawn."""
    cells: defaultdict[Cell, list[Candidate]] = defaultdict(list)
    for one in sorted(chosen, key=lambda one: _lot(one, seed)):
        cells[one.cell].append(one)
    cap = largest_cap({cell: len(group) for cell, group in cells.items()}, ratio)
    return [one for group in cells.values() for one in group[:cap]]


def _lot(one: Candidate, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}/{one.problem}/{one.sample}".encode(), digest_size=8).digest()
