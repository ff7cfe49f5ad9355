"""What a sample of problems says about a model, and about the difference between two.

Problems are what is resampled and what is paired: the samples of one problem are not independent evidence.

Shapes: P problems, R resamples, U reachable sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, gcd, lcm

import numpy as np

RESAMPLES = 10_000
_CHUNK = 2_000_000  # numbers drawn at once


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over problems and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Scores:
    """Of each problem `right_P[p]` of `of` trials; the problems in a fixed order.

    Attributes:
        problems: what each is known by, the same in every run that asked it.
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


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n samples, c of them right, hold a right one: 1 - C(n-c, k) / C(n, k).

    Unbiased (arXiv 2107.03374, eq. 1), here in exact integers up to the last division.
    """
    assert 0 <= c <= n and 1 <= k <= n, (n, c, k)
    return 1 - comb(n - c, k) / comb(n, k)


def bootstrap(values_P: Sequence[float] | np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """The mean over problems with the percentile interval of resampled means (Efron and Tibshirani, 1993).

    With few problems, such as AIME's 30, it is a little too narrow; where all score alike it has no width.
    """
    values_P = np.asarray(values_P, float)
    count = len(values_P)
    assert count, "no problem to resample"
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // count)
    means_R = np.concatenate(
        [
            values_P[rng.integers(0, count, (min(rows, resamples - start), count))].mean(1)
            for start in range(0, resamples, rows)
        ]
    )
    low, high = np.quantile(means_R, (0.025, 0.975))
    return Interval(float(values_P.mean()), float(low), float(high))


@dataclass(frozen=True, slots=True)
class Comparison:
    """Run b against run a on the problems that both were asked.

    Attributes:
        problems: how many those are.
        difference: mean of b - mean of a, with its paired bootstrap interval.
        p: two-sided, of `sign_flip`.
    """

    problems: int
    difference: Interval
    p: float


def compare(a: Scores, b: Scores, seed: int = 0) -> Comparison | None:
    """None where no problem is common."""
    place = {problem: index for index, problem in enumerate(a.problems)}
    pairs = [(place[problem], index) for index, problem in enumerate(b.problems) if problem in place]
    if not pairs:
        return None
    # Over their common denominator the differences are integers.
    whole = lcm(a.of, b.of)
    shifts_P = [b.right_P[j] * (whole // b.of) - a.right_P[i] * (whole // a.of) for i, j in pairs]
    return Comparison(len(pairs), bootstrap(np.array(shifts_P) / whole, seed), sign_flip(shifts_P))


def sign_flip(differences_P: Sequence[int]) -> float:
    """Two-sided p-value of the sign-flip permutation test: P(|Σ ±d_p| >= |Σ d_p|) under fair signs.

    The null says that the two runs are exchangeable on each problem (Fisher, 1935, ch. 21). It is exact: the
    distribution of the sum is built up by convolution, no permutation is drawn. With one trial a problem the
    differences are -1, 0 and 1, and this is the exact McNemar test.
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
    """P-values of several tests, adjusted so that p bounds the chance of any false finding (Holm, 1979)."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    adjusted, highest = [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, values[index] * (len(values) - rank)))
        adjusted[index] = highest
    return adjusted
