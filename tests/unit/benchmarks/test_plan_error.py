"""The benchmark of the plan's model of time runs, and its fit finds rates that made the times."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.plan_error import Case, cost_of, fit, measured_here, predicted, published
from megatron_parallel_r1.distributed import process
from megatron_parallel_r1.planning.machine import Cost


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    with process.running(seed=1):
        yield


def test_the_fit_finds_the_rates_behind_the_times() -> None:
    costs = [
        Cost(products=1e9 * a, attention=1e7 * b, stream=1e8 * c, layers=d, passes=c * d, updates=1)
        for a, b, c, d in [(1, 2, 3, 4), (4, 3, 2, 1), (2, 2, 5, 9), (7, 1, 1, 2), (3, 9, 4, 4), (1, 1, 9, 1)]
    ]
    times = [
        cost.products / 5e9 + cost.attention / 1e8 + cost.layers * 0.01 + cost.passes * 0.02 + 0.3
        for cost in costs
    ]
    found = fit(list(zip(costs, times, strict=True)))
    assert found.products == pytest.approx(5e9, rel=1e-6) and found.attention == pytest.approx(1e8, rel=1e-6)
    assert (found.layer, found.decoding_layer, found.update) == pytest.approx((0.01, 0.02, 0.3), rel=1e-6)
    for cost, seconds in zip(costs, times, strict=True):
        assert found.seconds(cost) == pytest.approx(seconds, rel=1e-6)


def test_every_case_is_measured_and_predicted() -> None:
    cases = [Case("update", 64, 1, 1, 64), Case("draws", 64, 1, 2, 8, held_out=True)]
    rows = measured_here(1, 2, cases).rows
    assert [row[-1] for row in rows] == ["fitted", "held out"]
    assert all(float(row[3]) >= 0 for row in rows)
    assert cost_of(cases[1], 2).passes == 2 * 1


def test_large_runs_are_predicted() -> None:
    (table,) = predicted()
    assert [row[1] for row in table.rows] == ["8", "64", "256", "1024"] * 3
    by_gpus = [float(row[5]) for row in table.rows[:4]]
    assert by_gpus == sorted(by_gpus, reverse=True)
    assert [row[-1] for row in published().rows].count("calibrated") == 2
