"""Scores over problems: intervals, pass@k, majority votes, and the paired test of two runs.

Problems are the unit and are paired, because the samples of one problem are not independent of each other.

Shapes: P problems, U reachable sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb, gcd, lcm, sqrt

import numpy as np

from megatron_parallel_r1.rewards.verifier import Verifier

Z95 = 1.959963984540054  # the normal distribution's 97.5 % quantile


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over problems and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class ProblemScores:
    """Right trials of each problem: `right_P[p]` of `of`, with the problems in a fixed order.

    Attributes:
        problems: identities, the same in every run on the same problem.
    """

    problems: tuple[str, ...]
    right_P: tuple[int, ...]
    of: int

    def __post_init__(self) -> None:
        assert self.problems and len(self.problems) == len(self.right_P), "a score for each problem"
        assert self.of >= 1 and all(0 <= right <= self.of for right in self.right_P)

    @property
    def means_P(self) -> np.ndarray:
        return np.array(self.right_P) / self.of

    @property
    def interval(self) -> Interval:
        """The mean over problems with its 95 % interval."""
        return score_interval(self.means_P, self.of)


def score_interval(values_P: Sequence[float] | np.ndarray, trials: int = 1) -> Interval:
    """The mean of scores in 0..1 with its 95 % Wilson score interval.

    The effective sample size is P p (1 - p) / s², with s² the variance between problems (the design effect of
    Kish, 1965), bounded by P, where the trials of a problem are all alike, and by P * `trials`, where all
    trials are independent. With one trial a problem this is the ordinary Wilson interval. Unlike a normal or
    a bootstrap interval it has a width at 0 % and 100 % and keeps its coverage for few problems.

    Args:
        trials: independent trials that each value is the mean of.
    """
    values_P = np.asarray(values_P, float)
    count = len(values_P)
    assert count, "no problem to score"
    mean = float(values_P.mean())
    effective = float(count)
    if count > 1 and 0 < mean < 1:
        variance = float(values_P.var(ddof=1))
        limit = float(count * trials)
        effective = min(max(count * mean * (1 - mean) / variance, effective), limit) if variance else limit
    return wilson_interval(mean, effective)


def wilson_interval(mean: float, trials: float) -> Interval:
    """The 95 % Wilson score interval of a share of independent trials (Wilson, 1927)."""
    shrink = 1 + Z95**2 / trials
    centre = (mean + Z95**2 / (2 * trials)) / shrink
    half = Z95 * sqrt(mean * (1 - mean) / trials + Z95**2 / (4 * trials**2)) / shrink
    return Interval(mean, max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half)))


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n samples, c of them right, include a right one: 1 - C(n-c, k) / C(n, k).

    Unbiased (arXiv 2107.03374, eq. 1), in exact integers up to the last division.
    """
    assert 0 <= c <= n and 1 <= k <= n, (n, c, k)
    return 1 - comb(n - c, k) / comb(n, k)


def difference_interval(differences_P: Sequence[float] | np.ndarray) -> Interval:
    """The mean of paired differences in -1..1 with its 95 % interval (Agresti and Min, 2005).

    The normal interval after adding two pseudo-problems of weights 1/2, 1/2 and 1 with differences -1, 1 and
    0. With one trial a problem that is their interval for matched proportions, 1/2 added to each of the four
    cells. Unlike a normal or a bootstrap interval it has a width where all differences are alike, and keeps
    its coverage for few problems.
    """
    differences_P = np.asarray(differences_P, float)
    assert len(differences_P), "no problem to compare"
    mean, count = float(differences_P.mean()), len(differences_P) + 2
    centre = float(differences_P.sum()) / count
    variance = (float(np.square(differences_P).sum()) + 1) / count - centre**2
    half = Z95 * sqrt(variance / count)
    return Interval(mean, max(-1.0, min(mean, centre - half)), min(1.0, max(mean, centre + half)))


@dataclass(frozen=True, slots=True)
class Comparison:
    """Run b against run a on the problems of both.

    Attributes:
        problems: number of common problems.
        difference: mean of b - mean of a, with its interval.
        p: two-sided p-value of `sign_flip`.
    """

    problems: int
    difference: Interval
    p: float


def compare(a: ProblemScores, b: ProblemScores) -> Comparison | None:
    """Compares two runs; None if they have no problem in common."""
    place = {problem: index for index, problem in enumerate(a.problems)}
    pairs = [(place[problem], index) for index, problem in enumerate(b.problems) if problem in place]
    if not pairs:
        return None
    # Over their common denominator the differences are integers.
    whole = lcm(a.of, b.of)
    shifts_P = [b.right_P[j] * (whole // b.of) - a.right_P[i] * (whole // a.of) for i, j in pairs]
    return Comparison(len(pairs), difference_interval(np.array(shifts_P) / whole), sign_flip(shifts_P))


def sign_flip(differences_P: Sequence[int]) -> float:
    """Two-sided p-value of the sign-flip permutation test: P(|Σ ±d_p| >= |Σ d_p|) under fair signs.

    The null hypothesis is that the two runs are exchangeable on each problem (Fisher, 1935, ch. 21). The
    p-value is exact: the distribution of the sum is built by convolution, not by drawing permutations. With
    one trial a problem the differences are -1, 0 and 1, and this is the exact McNemar test.
    """
    observed = sum(differences_P)
    sizes = [abs(difference) for difference in differences_P if difference]
    if not sizes:
        return 1.0
    unit = gcd(*sizes)
    sizes, observed = [size // unit for size in sizes], abs(observed) // unit
    # Σ ±d = 2 (sum of those with plus) - Σ |d|.
    total = sum(sizes)
    chance_U = np.zeros(total + 1)
    chance_U[0] = 1.0
    reach = 0
    for size in sizes:
        chance_U[: reach + 1] /= 2
        chance_U[size : reach + size + 1] += chance_U[: reach + 1].copy()
        reach += size
    extreme_U = np.abs(2 * np.arange(total + 1) - total) >= observed
    return float(min(1.0, chance_U[extreme_U].sum()))


def holm(values: Sequence[float]) -> list[float]:
    """P-values of several tests, adjusted to bound the chance of any false finding (Holm, 1979)."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    adjusted, highest = [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, values[index] * (len(values) - rank)))
        adjusted[index] = highest
    return adjusted


AnswerPair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Ballot:
    """One sample's answer, None for none, and whether it is right."""

    answer: str | None
    correct: bool


def right_votes(
    problems: Sequence[Sequence[Ballot]], votes: int, verifier: Verifier
) -> tuple[tuple[int, ...], int]:
    """The number of votes of each problem that elect a right answer, and the number of votes per problem.

    Majority votes are self-consistency (arXiv 2203.11171). Answers that the rewards' verifier holds equal
    vote together; a response without an answer has no vote. Of equally frequent answers the first wins:
    samples are exchangeable, so that is a fair draw without a seed.

    Args:
        problems: the ballots of each, in the order of samples, the same number for all.
        votes: ballots in one vote: samples 0..votes-1, the next `votes`, and so on.
    """
    equal = _equalities(problems, verifier)
    count = len(problems[0]) // votes
    right = tuple(
        sum(_elects_right(ballots[start : start + votes], equal) for start in range(0, count * votes, votes))
        for ballots in problems
    )
    return right, count


def elect(ballots: Sequence[Ballot], equal: Mapping[AnswerPair, bool]) -> int | None:
    """The index of the first ballot for the winning answer; None if no ballot has an answer.

    Args:
        equal: whether two answers are equal, by their sorted pair.
    """
    tallies: dict[int, int] = {}
    for index, ballot in enumerate(ballots):
        if ballot.answer is None:
            continue
        first = next((other for other in tallies if _same_vote(ballots[other], ballot, equal)), index)
        tallies[first] = tallies.get(first, 0) + 1
    # `max` returns the first of equals, and a dict keeps the order of insertion.
    return max(tallies, key=tallies.__getitem__) if tallies else None


def _elects_right(ballots: Sequence[Ballot], equal: Mapping[AnswerPair, bool]) -> bool:
    winner = elect(ballots, equal)
    return winner is not None and ballots[winner].correct


def _same_vote(a: Ballot, b: Ballot, equal: Mapping[AnswerPair, bool]) -> bool:
    """A right and a wrong answer are never equal: the verifier compared both with the reference."""
    if a.correct != b.correct:
        return False
    return a.answer == b.answer or equal[_sorted_pair(a.answer or "", b.answer or "")]


def _equalities(problems: Sequence[Sequence[Ballot]], verifier: Verifier) -> dict[AnswerPair, bool]:
    """The verdict on every pair of answers that may meet in a vote, in one batch."""
    pairs: dict[AnswerPair, None] = {}
    for ballots in problems:
        for side in (True, False):
            answers = dict.fromkeys(b.answer for b in ballots if b.answer is not None and b.correct is side)
            pairs.update(dict.fromkeys(_sorted_pair(a, b) for a, b in combinations(answers, 2)))
    verdicts = verifier.check_many(list(pairs))
    return {pair: verdict.correct for pair, verdict in zip(pairs, verdicts, strict=True)}


def _sorted_pair(a: str, b: str) -> AnswerPair:
    return (a, b) if a <= b else (b, a)
