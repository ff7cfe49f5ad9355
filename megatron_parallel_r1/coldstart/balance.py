"""Chooses the traces of the data set from those that pass.

The cell of a trace is (number of blocks, paths of its widest block). Two rules, in turn:

1. Each problem keeps at most per_problem traces, chosen so that the cells are as even as possible: no
   exchange of a chosen trace for another one of the same problem lowers the sum over cells of count².
   (Exchanges of several at once might; finding those is not worth a flow solver.)
2. With counts n_k of the cells that occur, every cell is cut to the largest c for which

       max_k min(n_k, c)  <=  ratio * mean_k min(n_k, c)

   The ratio of the left side to the mean never falls as c grows, so c is well defined, and no other choice
   within that ratio keeps more traces: one whose fullest cell holds M has a mean of at most that under c = M.

Ties are broken at random, by a hash of the seed and the trace alone.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_parallel_r1.coldstart.checks import TraceShape
from megatron_parallel_r1.config.selection import Balance

ShapeCell = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A trace that passes: sample `sample` of problem `problem`, both indices."""

    problem: int
    sample: int
    shape: TraceShape

    @property
    def cell(self) -> ShapeCell:
        return self.shape.blocks, self.shape.widest


def balance(candidates: Sequence[Candidate], settings: Balance, seed: int) -> list[Candidate]:
    """Returns the chosen candidates, sorted by problem and sample, independent of the input order."""
    ordered = sorted(candidates, key=lambda candidate: (candidate.problem, candidate.sample))
    chosen = _limit_per_problem(ordered, settings.per_problem)
    if settings.ratio is not None:
        chosen = _cap_cells(chosen, settings.ratio, seed)
    return sorted(chosen, key=lambda candidate: (candidate.problem, candidate.sample))


def largest_cap(counts: Mapping[ShapeCell, int], ratio: float) -> int:
    """Returns the c of rule 2; 0 without counts."""
    cap = 0
    for trial in range(1, max(counts.values(), default=0) + 1):
        total = sum(min(count, trial) for count in counts.values())
        if trial * len(counts) > ratio * total:
            break
        cap = trial
    return cap


def _limit_per_problem(ordered: Sequence[Candidate], most: int) -> list[Candidate]:
    """Rule 1: takes the first ones of each problem, then exchanges while that lowers the sum of squares."""
    of_problem: defaultdict[int, list[Candidate]] = defaultdict(list)
    for candidate in ordered:
        of_problem[candidate.problem].append(candidate)
    inside = [group[:most] for group in of_problem.values()]
    outside = [group[most:] for group in of_problem.values()]
    counts = Counter(candidate.cell for group in inside for candidate in group)
    moved = True
    while moved:  # terminates: every exchange lowers a sum of squares of integers
        moved = any([_exchange(*groups, counts) for groups in zip(inside, outside, strict=True)])
    return [candidate for group in inside for candidate in group]


def _exchange(inside: list[Candidate], outside: list[Candidate], counts: Counter[ShapeCell]) -> bool:
    """Makes the best exchange within one problem; returns False if none lowers the sum of squares.

    Moving a trace from a cell of a traces to a cell of b changes the sum by 2 (b - a + 1).
    """
    if not outside:
        return False
    outgoing = max(range(len(inside)), key=lambda i: (counts[inside[i].cell], -i))
    incoming = min(range(len(outside)), key=lambda i: (counts[outside[i].cell], i))
    if counts[outside[incoming].cell] + 1 >= counts[inside[outgoing].cell]:
        return False
    counts[inside[outgoing].cell] -= 1
    counts[outside[incoming].cell] += 1
    inside[outgoing], outside[incoming] = outside[incoming], inside[outgoing]
    return True


def _cap_cells(chosen: Sequence[Candidate], ratio: float, seed: int) -> list[Candidate]:
    """Rule 2: keeps a random subset of each cell above the cap."""
    cells: defaultdict[ShapeCell, list[Candidate]] = defaultdict(list)
    for candidate in sorted(chosen, key=lambda candidate: _random_rank(candidate, seed)):
        cells[candidate.cell].append(candidate)
    cap = largest_cap({cell: len(group) for cell, group in cells.items()}, ratio)
    return [candidate for group in cells.values() for candidate in group[:cap]]


def _random_rank(candidate: Candidate, seed: int) -> bytes:
    text = f"{seed}/{candidate.problem}/{candidate.sample}"
    return hashlib.blake2b(text.encode(), digest_size=8).digest()
