from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_parallel_r1.rewards.verifier import Verifier


@pytest.fixture(scope="session")
def verifier() -> Iterator[Verifier]:
    with Verifier(limit_s=10.0) as verifier:
        yield verifier
