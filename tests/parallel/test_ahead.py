"""Rolling out ahead over two processes, against one process, by torchrun over gloo.

Two threads of each process meet those of the other: on groups of their own, or this would hang. Not covered
here: nccl.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.launch import torchrun

TOLERANCE = 2e-5  # float32, logits of some units: a few hundred roundings of 6e-8


def launched(folder: Path, processes: int, *cases: str) -> dict[str, list[dict[str, Any]]]:
    """What each rank of `tests.parallel.ahead` found, by case."""
    torchrun(processes, "ahead", folder / "found.json", *cases)
    return json.loads((folder / "found.json").read_text())


def assert_same(ours: list[Any], theirs: list[Any]) -> None:
    """The same rounds, problems, tokens and versions; log-probs but for rounding."""
    for (*facts, traces), (*expected, others) in zip(ours, theirs, strict=True):
        assert facts == expected
        assert [trace[:2] for trace in traces] == [other[:2] for other in others]
        for (_, _, found), (_, _, wanted) in zip(traces, others, strict=True):
            assert found == pytest.approx(wanted, abs=TOLERANCE)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    (found,) = launched(tmp_path_factory.mktemp("alone"), 1, "")[""]
    return found["batches"]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return launched(tmp_path_factory.mktemp("two"), 2, "team=1", "team=2", "team=2 staleness=2")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["team=1", "team=2"])
def test_two_processes_roll_out_ahead_what_one_does(alone: list[Any], two, case: str) -> None:
    assert max(rounds for rounds, *_ in alone) > 1, "no group was ever dropped"
    ranks = two[case]
    assert ranks[0]["batches"] == ranks[1]["batches"]
    assert_same(ranks[0]["batches"], alone)
    for step, (_, _, traces) in enumerate(ranks[0]["batches"], start=1):
        assert {version for _, versions, _ in traces for version in versions} == {max(0, step - 2)}


@pytest.mark.slow
def test_a_team_takes_offered_weights_at_one_pass(two) -> None:
    ranks = two["team=2 staleness=2"]
    assert ranks[0]["batches"] == ranks[1]["batches"]
    assert ranks[0]["crossing"] == ranks[1]["crossing"]
    met = {version for _, versions in ranks[0]["crossing"] for version in versions}
    assert len(met) >= 3, met
