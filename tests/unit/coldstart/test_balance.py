"""The balance against its definition, on random small cases."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest

from megatron_parallel_r1.coldstart.balance import Candidate, balance, largest_cap
from megatron_parallel_r1.coldstart.checks import TraceShape
from megatron_parallel_r1.config.selection import Balance

SHAPES = (TraceShape((2,)), TraceShape((2, 2)), TraceShape((3,)), TraceShape((2, 3)))


def candidates(rng: random.Random, problems: int, most: int) -> list[Candidate]:
    return [
        Candidate(problem, sample, rng.choices(SHAPES, (8, 3, 2, 1))[0])
        for problem in range(problems)
        for sample in range(rng.randint(1, most))
    ]


def cells(chosen: list[Candidate]) -> Counter:
    return Counter(candidate.cell for candidate in chosen)


def test_all_stay_where_nothing_is_asked() -> None:
    pool = candidates(random.Random(0), 20, 3)
    assert balance(pool, Balance(per_problem=3), seed=0) == pool


@pytest.mark.parametrize("case", range(30))
def test_per_problem_is_as_even_as_single_exchanges_make_it(case: int) -> None:
    rng = random.Random(case)
    pool = candidates(rng, 12, 4)
    most = rng.randint(1, 2)
    chosen = balance(pool, Balance(per_problem=most), seed=0)
    assert len(set(chosen)) == len(chosen) and set(chosen) <= set(pool)
    offered, taken = (
        Counter(candidate.problem for candidate in pool),
        Counter(candidate.problem for candidate in chosen),
    )
    assert all(taken[problem] == min(most, offered[problem]) for problem in offered)
    squares = sum(count**2 for count in cells(chosen).values())
    for leaves, comes in itertools.product(chosen, set(pool) - set(chosen)):
        if leaves.problem == comes.problem:
            other = cells([candidate for candidate in chosen if candidate != leaves] + [comes])
            assert sum(count**2 for count in other.values()) >= squares


@pytest.mark.parametrize("ratio", [1.0, 1.3, 2.0, 3.0])
@pytest.mark.parametrize("case", range(8))
def test_no_choice_of_the_ratio_keeps_more(ratio: float, case: int) -> None:
    rng = random.Random(case)
    counts = {(blocks, 2): rng.randint(1, 6) for blocks in range(1, 4)}
    cap = largest_cap(counts, ratio)
    best = max(
        sum(held)
        for held in itertools.product(*(range(count + 1) for count in counts.values()))
        if any(held) and max(held) * len(counts) <= ratio * sum(held)
    )
    assert sum(min(count, cap) for count in counts.values()) == best


def test_ratio_of_one_makes_all_cells_equal() -> None:
    pool = candidates(random.Random(1), 60, 1)
    before, after = cells(pool), cells(balance(pool, Balance(ratio=1.0), seed=0))
    assert set(after) == set(before) and set(after.values()) == {min(before.values())}


def test_choice_is_by_the_seed_and_not_by_the_order_given() -> None:
    pool = candidates(random.Random(2), 60, 3)
    settings = Balance(per_problem=2, ratio=1.5)
    chosen = balance(pool, settings, seed=0)
    shuffled = random.Random(3).sample(pool, len(pool))
    assert balance(shuffled, settings, seed=0) == chosen
    assert balance(pool, settings, seed=1) != chosen
    assert chosen == sorted(chosen, key=lambda candidate: (candidate.problem, candidate.sample))


def test_no_candidates() -> None:
    assert balance([], Balance(ratio=1.0), seed=0) == []
