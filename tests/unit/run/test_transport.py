"""Weights travel over NCCL only between processes of one version."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_parallel_r1.config.rollout import Rollout
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.servers.client import STOCK_MODES, ServerInfo
from megatron_parallel_r1.run import transport
from megatron_parallel_r1.run.transport import usable_sync

URL = "http://a:30000"
OURS, THEIRS = (2, 27, 3), (2, 30, 7)


def infos(nccl: tuple[int, ...] | None) -> dict[str, ServerInfo]:
    return {URL: ServerInfo("m", STOCK_MODES, 0, 64, None, nccl=nccl)}


def rollout(**sync: object) -> Rollout:
    return Rollout(engine="sglang", urls=(URL,), sync=sync)


@pytest.fixture(autouse=True)
def with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "trainer_nccl", lambda: OURS)


@pytest.mark.parametrize(
    ("sync", "theirs"),
    [
        ({}, OURS),
        ({}, None),
        ({"backend": "gloo"}, THEIRS),
        ({"transport": "tensor"}, THEIRS),
        ({"transport": "disk", "folder": "out"}, THEIRS),
    ],
)
def test_the_recipe_holds_where_no_difference_is_known(sync: dict, theirs: tuple[int, ...] | None) -> None:
    recipe = rollout(**sync)
    assert usable_sync(recipe, infos(theirs)) == (recipe.sync, "")


def test_without_gpus_no_version_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "trainer_nccl", lambda: None)
    assert usable_sync(rollout(), infos(THEIRS)) == (rollout().sync, "")


def test_other_versions_take_the_folder_or_are_refused() -> None:
    sync, warning = usable_sync(rollout(folder="out"), infos(THEIRS))
    assert sync.transport == "disk"
    assert warning == (
        "rollout.sync.transport distributed: NCCL is 2.27.3 here and 2.30.7 in http://a:30000, which cannot "
        "share a group; weights go through out (disk)"
    )
    with pytest.raises(UserError, match=r"2\.30\.7 in http://a:30000.*; set transport disk with a folder"):
        usable_sync(rollout(), infos(THEIRS))


@pytest.mark.parametrize(
    ("program", "refused"),
    [
        ('print(\'{"engine": "0.5", "torch": "2.14", "nccl": [2, 30, 7]}\')', True),
        ('print(\'{"engine": "0.5", "torch": "2.14", "nccl": [2, 27, 3]}\')', False),
        ("raise ImportError('torch')", False),
    ],
)
def test_own_servers_are_asked_by_their_interpreter(
    monkeypatch: pytest.MonkeyPatch, program: str, refused: bool
) -> None:
    monkeypatch.setattr(transport, "_ENGINE_VERSIONS", program)
    monkeypatch.setattr(transport, "find_python", lambda settings: Path(sys.executable))
    own = Rollout(engine="sglang", servers=1)
    if refused:
        with pytest.raises(UserError, match=r"here and 2\.30\.7 in the run's sglang servers"):
            usable_sync(own, {})
    else:
        assert usable_sync(own, {}) == (own.sync, "")
