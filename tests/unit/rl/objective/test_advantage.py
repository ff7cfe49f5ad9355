"""Advantages, dynamic sampling, over-long shaping and per-path credit against cases worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_parallel_r1.rl.objective.advantage import (
    ADVANTAGES,
    dr_grpo_advantages,
    group_advantages,
    informative,
    papo_advantages,
    path_advantages,
    rloo_advantages,
    scored_advantages,
)
from megatron_parallel_r1.rl.objective.overlong import complete, overlong_penalties
from megatron_parallel_r1.thought.parser import parse
from megatron_parallel_r1.thought.trace import Outline, Trace
from megatron_parallel_r1.thought.tree import Tree
from tests.reference.traces import TAGS


def test_grpo_by_hand() -> None:
    rewards_PG = np.array([[1.0, 1.0, -1.0, -1.0], [1.0, 1.0, 1.0, 1.0], [1.0, -1.0, -1.0, -1.0]])
    # Sums of squares 4, 0, 3, each over G - 1 = 3; the last: 1.5 / 1 and -0.5 / 1.
    std = math.sqrt(4 / 3)
    expected = [[1 / std, 1 / std, -1 / std, -1 / std], [0.0] * 4, [1.5, -0.5, -0.5, -0.5]]
    assert np.allclose(group_advantages(rewards_PG), expected, atol=1e-5)  # eps of 1e-6 beside the std
    assert (group_advantages(np.ones((3, 1))) == 0).all()


def test_dr_grpo_by_hand() -> None:
    # Means 0.25 and 2: the differences, whatever their spread.
    rewards_PG = np.array([[1.0, 0.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    assert dr_grpo_advantages(rewards_PG).tolist() == [[0.75, -0.25, -0.25, -0.25], [0.0] * 4]


def test_rloo_by_hand() -> None:
    # The others' means: (0 + 2) / 2 = 1, (1 + 2) / 2 = 1.5, (1 + 0) / 2 = 0.5.
    assert rloo_advantages(np.array([[1.0, 0.0, 2.0]])).tolist() == [[0.0, -1.5, 1.5]]
    assert rloo_advantages(np.array([[3.0]])).tolist() == [[0.0]]


def test_papo_by_hand() -> None:
    # Means 0.5 and 1. Of all eight the sum is 6 and that of the squares 8: 8 - 36 / 8 = 3.5, over 7.
    rewards_PG = np.array([[1.0, 0.0, 1.0, 0.0], [2.0, 0.0, 1.0, 1.0]])
    std = math.sqrt(0.5)
    expected = np.array([[0.5, -0.5, 0.5, -0.5], [1.0, -1.0, 0.0, 0.0]]) / std
    assert np.allclose(papo_advantages(rewards_PG), expected, atol=1e-5)
    assert (papo_advantages(np.ones((2, 3))) == 0).all() and (papo_advantages(np.ones((1, 1))) == 0).all()
    # A trace without a reward counts nowhere: of the seven others 8 - 36 / 7 = 20 / 7, over 6.
    rewards_PG[0, 3] = np.nan
    found_PG = scored_advantages("papo", rewards_PG, np.isnan(rewards_PG))
    assert np.allclose(found_PG[1], np.array([1.0, -1.0, 0.0, 0.0]) / math.sqrt(20 / 42), atol=1e-5)
    assert np.ma.getmaskarray(found_PG)[0].tolist() == [False, False, False, True]


def test_estimators_by_name() -> None:
    rewards_PG = np.array([[1.0, -1.0]])
    # std of (1, -1) is sqrt 2.
    expected = {"grpo": 1 / math.sqrt(2), "dr_grpo": 1.0, "rloo": 2.0, "papo": 1 / math.sqrt(2)}
    found = {name: estimator(rewards_PG)[0, 0] for name, estimator in ADVANTAGES.items()}
    assert found == pytest.approx(expected, rel=1e-5)


def test_informative_groups_differ() -> None:
    rewards_PG = np.array([[1.0, 1.0, 1.0], [1.0, 1.0, -1.0], [0.1, 0.1, 0.1]])
    assert informative(rewards_PG).tolist() == [False, True, False]


def test_overlong_penalties_by_hand() -> None:
    lengths_T = np.array([10, 80, 85, 90, 100, 120])
    # limit 100, cache 20: (80 - 85) / 20 = -1/4, (80 - 90) / 20 = -1/2
    assert overlong_penalties(lengths_T, 100, 20).tolist() == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]
    assert overlong_penalties(lengths_T, 100, 20, penalty=2.0).tolist() == [0.0, 0.0, -0.5, -1.0, -2.0, -2.0]


@pytest.mark.parametrize("cache", [0, 101])
def test_overlong_cache_must_fit(cache: int) -> None:
    with pytest.raises(ValueError, match=r"does not fit a limit of 100; use 1\.\.100"):
        overlong_penalties(np.array([1]), 100, cache)


def test_complete_traces_end_by_themselves() -> None:
    def outline(finish: str) -> Outline:
        return Trace((1,), (9,), (True,), (False,), (-1.0,), finish, Tree(1)).outline

    assert complete([outline("eos"), outline("length"), outline("eos")]).tolist() == [True, False, True]


# main <Parallel> <Path> a </Path> <Path> b </Path> <Path> c </Path> </Parallel> <Summary> s </Summary> main
#  0       1         2   3    4       5   6    7       8   9   10        11          12     13    14      15
FLAT = parse([9, 0, 2, 9, 3, 2, 9, 3, 2, 9, 3, 1, 4, 9, 5, 9], TAGS, strict=True)
# <Parallel> <Path> <Parallel> <Path> </Path> <Path> </Path> </Parallel> <Summary> </Summary> </Path>
#     0         1       2         3      4       5      6         7          8          9        10
# <Path> </Path> </Parallel> <Summary> </Summary>
#   11     12        13         14        15
NESTED = parse([0, 2, 0, 2, 3, 2, 3, 1, 4, 5, 3, 2, 3, 1, 4, 5], TAGS, strict=True)


def test_path_credit_by_hand() -> None:
    found = path_advantages(FLAT, [[True, False, False]], advantage=0.7)
    # Rewards 1, -1, -1: mean -1/3, squares 16/9 + 4/9 + 4/9 = 24/9, over 2: std sqrt(4/3).
    std = math.sqrt(4 / 3)
    right, wrong = (4 / 3) / std, (-2 / 3) / std
    expected = [0.7, 0.7, *[right] * 3, *[wrong] * 6, *[0.7] * 5]
    assert np.allclose(found, expected, atol=1e-5)  # eps of 1e-6 beside the std


def test_path_credit_without_an_answer_is_the_trace_s() -> None:
    found = path_advantages(FLAT, [[True, None, False]], advantage=0.7, kind="dr_grpo")
    assert found.tolist() == [0.7, 0.7, 1, 1, 1, 0.7, 0.7, 0.7, -1, -1, -1, *[0.7] * 5]
    assert path_advantages(FLAT, [[True, None, None]], 0.7).tolist() == [0.7] * 16
    assert path_advantages(FLAT, [[None] * 3], 0.7).tolist() == [0.7] * 16


def test_path_credit_of_equal_siblings_is_nothing() -> None:
    found = path_advantages(FLAT, [[True, True, True]], advantage=0.7)
    assert found.tolist() == [0.7, 0.7, *[0.0] * 9, *[0.7] * 5]


def test_path_credit_of_nested_blocks_is_their_own() -> None:
    found = path_advantages(NESTED, [[True, False], [False, True]], 0.5, "dr_grpo")
    inner = [1, 1, -1, -1, 1, 1, 1, 1, 1, 1]  # indices 1 to 10: the outer path, with its two inner ones
    assert found.tolist() == [0.5, *inner, -1, -1, 0.5, 0.5, 0.5]


def test_path_credit_needs_a_verdict_a_path() -> None:
    with pytest.raises(ValueError, match="zip"):
        path_advantages(FLAT, [[True, False]], 0.5)
