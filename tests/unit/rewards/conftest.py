from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_parallel_r1.rewards.verifier import Verifier


@pytest.fixture(scope="session")
def verifier() -> Iterator[Verifier]:
    with Verifier(limit_s=10.0) as verifier:
        yield verifier


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the real data sets; tests that need it skip where it is absent."""
    root = Path(__file__).resolve().parents[3]
    folder = Path(os.environ.get("MPR1_SHARED") or root.parent / "shared")
    if not (folder / "data").is_dir():
        pytest.skip("no real data: set MPR1_SHARED to the folder that holds data/")
    return folder
