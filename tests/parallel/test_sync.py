"""A split model's weights come together bucket by bucket, bit for bit; no process ever has all of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from tests.parallel.launch import torchrun

# `torch.equal` may hold one byte for each number that it compares.
COMPARED = 0.25


@pytest.fixture(scope="module")
def launched(
    selected: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], dict[str, Any]]:
    """What one launch of so many processes found, by layout."""

    @cache
    def launch(processes: int) -> dict[str, Any]:
        out = tmp_path_factory.mktemp("launched") / "found.json"
        layouts = [entry["layout"] for entry in selected if entry["processes"] == processes]
        torchrun(processes, "gathering", out, *layouts)
        return json.loads(out.read_text())

    return launch


@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        (1, ""),
        pytest.param(2, "tensor=2", marks=pytest.mark.slow),
        pytest.param(2, "pipeline=2 virtual=2", marks=pytest.mark.slow),
        pytest.param(4, "tensor=2 pipeline=2", marks=pytest.mark.slow),
        pytest.param(2, "pipeline=2", marks=pytest.mark.slow),
        pytest.param(4, "tensor=2", marks=pytest.mark.slow),
        pytest.param(4, "context=2 pipeline=2", marks=pytest.mark.slow),
        pytest.param(2, "experts expert=2", marks=pytest.mark.slow),
        pytest.param(4, "experts expert=2 pipeline=2", marks=pytest.mark.slow),
        pytest.param(4, "experts expert=4 tensor=2 sequence", marks=pytest.mark.slow),
    ],
)
def test_buckets_hold_all_weights_once(launched, processes: int, layout: str) -> None:
    for case, found in launched(processes)[layout].items():
        sender, *others = found["ranks"]
        assert sender["names"] and not sender["differing"], case
        assert sum(sender["sizes"]) == found["all"]
        assert sender["lasts"] == [False] * (len(sender["lasts"]) - 1) + [True]
        assert max(sender["sizes"]) <= max(found["bucket"], found["largest"])
        if found["bucket"] >= found["all"]:
            # One from each stage, none from the same one twice.
            assert len(sender["sizes"]) <= (2 if "pipeline=2" in layout else 1)
        assert not any(other["sent"] for other in others), "only the sender has buckets"
        for rank in found["everywhere"]:
            assert rank["names"] and not rank["differing"] and rank["sizes"] == sender["sizes"], case
            assert rank["lasts"] == sender["lasts"], case
        # A bucket, the parts of one parameter, and what came of them before they are let go.
        bound = min(max(found["bucket"], found["largest"]), found["all"]) + 2 * found["largest"]
        for rank, result in enumerate(found["ranks"]):
            assert result["peak"] <= bound + COMPARED * found["largest"], (case, rank, result["peak"], bound)
        if found["bucket"] == 20_000:
            # That this bound says something: a whole copy would break it.
            assert max(result["peak"] for result in found["ranks"]) < found["all"], case
