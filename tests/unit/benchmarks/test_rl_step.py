"""The benchmark of an RL step runs; its figures are not looked at."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from benchmarks import rl_step
from benchmarks.paced import Pace
from benchmarks.rl_step import SAMPLES, Size, exponent
from megatron_parallel_r1.distributed import process


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    with process.running(seed=1):
        yield


TINY = Size(2, 2, Pace(3, 3, 3))


def test_a_trace_has_the_size_that_was_asked_for() -> None:
    # Two stretches of the main chain, `<Path>` and three more twice, two tags, a summary.
    assert TINY.tokens == 3 + 2 * (1 + 3) + 2 + 3 + 3
    found = rl_step.steps(TINY, 1)  # which asserts that all traces have it
    assert len(found) == 1 and set(found[0].phases) == {
        "sync",
        "wait",
        "draw",
        "verify",
        "score",
        "logprobs",
        "update",
    }


def test_shares_cover_synchronous_and_asynchronous_steps() -> None:
    table = rl_step.shares(1, TINY)
    assert [row[0] for row in table.rows] == ["synchronous", "asynchronous"]
    assert all(len(row) == len(table.columns) for row in table.rows)


def test_growth_has_an_exponent_for_each_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [(SAMPLES * n, Size(n, 2, TINY.pace)) for n in (1, 2)]
    monkeypatch.setattr(rl_step, "SWEEPS", {"traces": sizes})
    (row,) = rl_step.growth(1).rows
    assert row[:2] == ("traces", "8, 16") and all(math.isfinite(float(cell)) for cell in row[3:])


@pytest.mark.slow
def test_processes_are_started_by_torchrun() -> None:
    seconds = rl_step._under_torchrun(2, 1)
    assert len(seconds) == 2 and min(seconds) > 0


def test_the_exponent_is_the_slope_of_the_logarithms() -> None:
    assert exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
