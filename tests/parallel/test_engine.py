"""The native engine shared by a team of processes against the one-process engine, by torchrun over gloo.

The model's vocabulary and feed-forward size divide by no team's size. Not covered here: bf16, nccl.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from tests.parallel.launch import settings_of, torchrun

TOLERANCE = 2e-5  # float32, logits of some units: a few hundred roundings of 6e-8


@pytest.fixture(scope="module")
def launched(
    selected: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], dict[str, list[dict[str, Any]]]]:
    """What each rank of one launch of so many processes found, by case."""

    @cache
    def launch(processes: int) -> dict[str, list[dict[str, Any]]]:
        out = tmp_path_factory.mktemp("launched") / "found.json"
        cases = [entry["case"] for entry in selected if entry["processes"] == processes]
        torchrun(processes, "engine", out, *cases)
        return json.loads(out.read_text())

    return launch


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "case"),
    [
        (2, "team=2"),
        (2, "team=2 tied"),
        (4, "team=4"),
        (4, "team=2"),
    ],
)
def test_a_team_decodes_what_one_process_does(launched, processes: int, case: str) -> None:
    size = settings_of(case)["team"]
    ranks = launched(processes)[case]
    assert len(ranks) == processes
    for found in ranks:
        for mode, facts in found["modes"].items():
            assert facts["agrees"], mode
            assert facts["greedy"] <= TOLERANCE and facts["sampled"] <= TOLERANCE, (mode, facts)
            assert facts["rows"][0] == facts["rows"][1] > 0, mode
            # A tied model's tags are not made likely: its sampled traces seldom have blocks.
            if mode != "sequential" and "tied" not in case:
                assert min(facts["blocks"]) >= 4, (mode, facts)
        assert found["refused"].endswith("does not divide the model's kv_heads 1; set parallel.tensor to 1")
    worst = max(facts[kind] for r in ranks for facts in r["modes"].values() for kind in ("greedy", "sampled"))
    print(f"{processes} processes {case}: largest difference of log-probs {worst:.1e}")
    counts = {"many": [4] * (size - 1) + [5], "other": [2] * size, "early": [1] * (size - 1) + [0]}
    counts["weights"] = [0] * size
    for found in ranks:
        for cause, requests in counts.items():
            divergence = f"diverged (requests: {', '.join(map(str, requests))})"
            assert divergence in found["parted"][cause], (cause, found["parted"][cause])
