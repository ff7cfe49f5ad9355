"""A step on a long trace: what the benchmark counts is what the layout has."""

from __future__ import annotations

from benchmarks.long_traces import PATH, PATHS, measure


def test_a_step_is_measured_and_its_pairs_are_those_that_see_each_other() -> None:
    isolated, replay = measure(200, "isolated"), measure(200, "replay")
    assert 200 <= isolated.critical < isolated.tokens == isolated.row - 1  # the prompt has one token
    assert min(isolated.seconds, replay.seconds, isolated.bytes, replay.bytes) > 0
    whole, path = isolated.row, PATH + 2
    hidden = path * path * sum(range(PATHS))  # each path of the one block hides all earlier ones
    assert isolated.pairs == whole * (whole + 1) // 2 - hidden
    # `replay` computes each path but the first once more, behind the flat trace.
    assert replay.row - isolated.row == (PATHS - 1) * path
