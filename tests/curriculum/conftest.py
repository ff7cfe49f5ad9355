from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.parallel.launch import ENVIRONMENT


@pytest.fixture(scope="module", autouse=True)
def quick_starts() -> Iterator[None]:
    """For the processes that these tests start by the dozen."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield
