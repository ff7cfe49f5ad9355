"""Ranks that are slower than the others. In a launch: tests/curriculum/test_many_processes.py."""

from __future__ import annotations

import pytest

from megatron_parallel_r1.distributed.stragglers import SLOW_STEPS, StragglerWatch

HOSTS = ["n1", "n1", "n2", "n2"]


def warnings(steps: list[list[float]], hosts: list[str] = HOSTS) -> list[tuple[int, str]]:
    """Warnings by step, from 1."""
    watch = StragglerWatch(hosts)
    found = [(step, watch.warning(watch.metrics(seconds))) for step, seconds in enumerate(steps, 1)]
    return [(step, warning) for step, warning in found if warning]


def test_the_slowest_rank_of_a_step_is_named() -> None:
    watch = StragglerWatch(HOSTS)
    assert watch.metrics([0.0] * 4) == {}  # before the first step
    assert watch.metrics([2.0, 2.5, 3.5, 2.0]) == {
        "time_pass_max_s": 3.5,
        "time_pass_median_s": 2.0,
        "slowest_rank": 2,
        "slowest_host": "n2",
    }


def test_a_rank_that_stays_slow_is_warned_of_once() -> None:
    ((step, warning),) = warnings([[2.0, 2.1, 2.0, 3.6]] * 3 * SLOW_STEPS)
    assert step == SLOW_STEPS
    assert warning.startswith("rank 3 on n2: slow in each of the last 10 steps, now 1.8 times the median")


def test_a_rank_that_is_slow_again_after_it_was_not_is_warned_of_again() -> None:
    slow, even = [[2.0, 2.0, 4.0, 2.0]] * SLOW_STEPS, [[2.0] * 4]
    assert [step for step, _ in warnings([*slow, *even, *slow])] == [SLOW_STEPS, 2 * SLOW_STEPS + 1]


@pytest.mark.parametrize(
    "steps",
    [
        [[2.0, 2.0, 2.0, 2.9]] * 40,  # not much slower
        [[0.01, 0.01, 0.01, 0.1]] * 40,  # ten times, but who would notice
        [[2.0, 5.0, 2.0, 2.0], [2.0, 2.0, 5.0, 2.0]] * 20,  # each now and then
        [[5.0, 5.0, 5.0, 2.0]] * 40,  # one is quick
    ],
)
def test_what_is_no_straggler(steps: list[list[float]]) -> None:
    assert not warnings(steps)


def test_a_slow_replica_is_one_warning_that_names_few_ranks() -> None:
    ((_, warning),) = warnings([[1.0] * 8 + [2.0] * 8 + [1.0] * 8] * SLOW_STEPS, ["n1"] * 8 + ["n2"] * 16)
    assert warning.startswith("rank 8 on n2, rank 9 on n2, rank 10 on n2, rank 11 on n2, 4 more: slow")


def test_of_two_replicas_the_slow_one_is_found() -> None:
    assert warnings([[1.0, 2.0]] * SLOW_STEPS, ["n1", "n2"])
