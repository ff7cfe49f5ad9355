"""Statistics against numbers worked out by hand, and laws that hold for any scores."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations, product
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_parallel_r1.evaluation.statistics import (
    ProblemScores,
    compare,
    difference_interval,
    holm,
    pass_at_k,
    score_interval,
    sign_flip,
)

ROUNDING = 1e-12  # a handful of float64 operations on numbers up to 1


def scores(*right: int, of: int = 1, names: str = "abcdefghij") -> ProblemScores:
    return ProblemScores(tuple(names[: len(right)]), right, of)


@pytest.mark.parametrize(
    ("n", "c", "k", "by_hand"),
    [
        (4, 1, 2, Fraction(1, 2)),  # C(3,2)/C(4,2) = 3/6 of the pairs miss it
        (5, 2, 3, Fraction(9, 10)),  # 1 of 10 triples holds no right one
        (10, 0, 5, Fraction(0)),
        (3, 2, 2, Fraction(1)),  # two cannot both be the one wrong
    ],
)
def test_pass_at_k_by_hand(n: int, c: int, k: int, by_hand: Fraction) -> None:
    assert pass_at_k(n, c, k) == pytest.approx(float(by_hand), abs=ROUNDING)


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(case: tuple[int, int, int]) -> None:
    n, c, k = case
    subsets = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=ROUNDING)
    assert pass_at_k(n, c, 1) == pytest.approx(c / n, abs=ROUNDING)
    assert pass_at_k(n, c, n) == float(c > 0)


@pytest.mark.parametrize(
    ("right", "problems", "low", "high"),
    [
        (0, 30, 0.0, 0.1135),  # z² / (n + z²) = 3.8415 / 33.8415
        (30, 30, 0.8865, 1.0),
        (0, 1, 0.0, 0.7935),
        (81, 263, 0.2553, 0.3662),  # Newcombe, Statistics in Medicine 17 (1998), table I
        (15, 148, 0.0624, 0.1605),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_one_trial_a_problem_gives_the_wilson_interval(
    right: int, problems: int, low: float, high: float
) -> None:
    found = score_interval([1.0] * right + [0.0] * (problems - right))
    assert (found.value, found.low, found.high) == pytest.approx((right / problems, low, high), abs=5e-5)


def test_several_trials_narrow_the_interval_as_far_as_they_are_independent() -> None:
    alike = score_interval([0.0, 1.0] * 20, trials=4)
    assert alike == score_interval([0.0, 1.0] * 20, trials=1), "the samples of a problem say the same"
    independent = score_interval([0.5] * 40, trials=4)
    assert independent == score_interval([0.0, 1.0] * 80, trials=1), "160 trials that differ within problems"
    assert score_interval([0.25, 0.75] * 20, trials=4).high < alike.high


@pytest.mark.parametrize(("problems", "trials"), [(10, 1), (30, 1), (30, 8), (200, 4)])
@pytest.mark.parametrize("difficulty", [0.02, 0.5, 0.95])
def test_score_intervals_cover_the_mean(problems: int, trials: int, difficulty: float) -> None:
    """1,000 sets of problems whose chances of a right answer follow a Beta distribution.

    Of a few scores near 0 or 1 the coverage of any interval oscillates around the nominal one; that of the
    bootstrap is 39 % for the ten problems here.
    """
    rng = np.random.default_rng(7)
    chances = rng.beta(2 * difficulty, 2 * (1 - difficulty), (1000, problems))
    right = rng.binomial(trials, chances)
    intervals = [score_interval(values / trials, trials) for values in right]
    held = sum(i.low <= difficulty <= i.high for i in intervals) / 1000
    assert held >= (0.92 if problems > 100 else 0.9)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_score_intervals_have_a_width_and_stay_in_range(right: list[int]) -> None:
    found = score_interval(np.array(right) / 4, trials=4)
    assert 0 <= found.low <= found.value <= found.high <= 1 and found.high - found.low > 0.01


@pytest.mark.parametrize(
    ("better", "worse", "equal", "low", "high"),
    [
        # (12 - 2) / 52 = 0.1923; (14 + 1) / 52 - 0.1923² = 0.2515; ± 1.96 sqrt(0.2515 / 52)
        (12, 2, 36, 0.0560, 0.3286),
        (0, 0, 30, -0.0612, 0.0612),  # 1.96 / 32
        (0, 0, 1, -0.6533, 0.6533),
        (10, 0, 0, 0.5666, 1.0),  # 10/12 - 1.96 sqrt((11/12 - (10/12)²) / 12)
        (0, 10, 0, -1.0, -0.5666),
    ],
)
def test_difference_interval_by_hand(better: int, worse: int, equal: int, low: float, high: float) -> None:
    differences = [1.0] * better + [-1.0] * worse + [0.0] * equal
    found = difference_interval(differences)
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)
    assert found.value == np.mean(differences)


@pytest.mark.parametrize(("problems", "trials"), [(10, 1), (30, 8), (200, 4)])
@pytest.mark.parametrize(("before", "after"), [(0.5, 0.5), (0.02, 0.02), (0.95, 0.99), (0.3, 0.6)])
def test_difference_intervals_cover_the_difference(
    problems: int, trials: int, before: float, after: float
) -> None:
    """1,000 pairs of runs on problems of different difficulty; both runs are better on the same ones."""
    rng = np.random.default_rng(7)
    chances = rng.beta(2 * before, 2 * (1 - before), (1000, problems))
    # Moves each chance towards 1, so that the mean moves by after - before.
    moved = chances + (1 - chances) * (after - before) / (1 - before)
    shifts = (rng.binomial(trials, moved) - rng.binomial(trials, chances)) / trials
    intervals = [difference_interval(shift) for shift in shifts]
    assert sum(i.low <= after - before <= i.high for i in intervals) / 1000 >= 0.92


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=12))
def test_difference_intervals_have_a_width_and_stay_in_range(quarters: list[int]) -> None:
    found = difference_interval(np.array(quarters) / 4)
    assert -1 <= found.low <= found.value <= found.high <= 1 and found.high - found.low > 0.01
    mirrored = difference_interval(np.array(quarters) / -4)
    assert (found.low, found.high) == pytest.approx((-mirrored.high, -mirrored.low), abs=ROUNDING)


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact McNemar test: twice the smaller binomial tail, at most 1."""
    n = only_a + only_b
    return min(1.0, 2 * sum(comb(n, i) for i in range(min(only_a, only_b) + 1)) / 2**n)


def test_sign_flip_by_hand() -> None:
    # Six problems differ, five for b: (1 + 6) of 64 sign patterns are as extreme on each side.
    assert sign_flip([1, 1, 1, 1, 1, -1, 0, 0]) == pytest.approx(14 / 64, abs=ROUNDING)
    assert mcnemar(1, 5) == pytest.approx(14 / 64, abs=ROUNDING)
    assert sign_flip([0, 0, 0]) == 1.0
    assert sign_flip([3, 2]) == pytest.approx(2 / 4, abs=ROUNDING)  # |5| by ++ and --, |1| by the others


@given(st.lists(st.integers(-4, 4), max_size=9))
def test_sign_flip_equals_all_permutations(differences: list[int]) -> None:
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in product((1, -1), repeat=len(differences))
    ]
    by_definition = sum(total >= abs(sum(differences)) for total in sums) / len(sums)
    assert sign_flip(differences) == pytest.approx(by_definition, abs=ROUNDING)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 5))
def test_on_single_trials_it_is_mcnemars_test(only_a: int, only_b: int, ties: int) -> None:
    differences = [1] * only_b + [-1] * only_a + [0] * ties
    assert sign_flip(differences) == pytest.approx(mcnemar(only_a, only_b), abs=1e-9)  # 80 halvings and sums


def test_sign_flip_of_many_problems_stays_exact_and_fast() -> None:
    differences = [(-1) ** i * (i % 17) for i in range(1319)]
    assert 0.5 < sign_flip(differences) <= 1.0
    assert sign_flip([16] * 1319) == pytest.approx(2.0**-1318, rel=1e-6)


def test_compare_uses_common_problems_and_a_common_denominator() -> None:
    before = scores(1, 0, 2, 2, of=2, names="abcd")
    after = ProblemScores(("d", "c", "b", "z"), (0, 4, 3, 4), of=4)
    found = compare(before, after)
    assert found is not None and found.problems == 3
    # d: 0/4 - 2/2, c: 4/4 - 2/2, b: 3/4 - 0/2.
    assert found.difference.value == pytest.approx((-1 + 0 + 0.75) / 3, abs=ROUNDING)
    assert found.p == pytest.approx(1.0, abs=ROUNDING)  # |-4 + 3| is the least that ±4 ±3 can be
    assert compare(before, ProblemScores(("z",), (1,), 1)) is None


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=10))
def test_compare_is_antisymmetric(pairs: list[tuple[int, int]]) -> None:
    a = scores(*(left for left, _ in pairs), of=3)
    b = scores(*(right for _, right in pairs), of=3)
    forth, back = compare(a, b), compare(b, a)
    assert forth.p == back.p
    assert forth.difference.value == pytest.approx(-back.difference.value, abs=ROUNDING)


def test_holm_by_hand() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06], abs=ROUNDING)
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
