"""A world of one process, which every test of the model needs."""

from collections.abc import Iterator

import pytest

from megatron_parallel_r1.distributed import process


@pytest.fixture(scope="module")
def world() -> Iterator[None]:
    with process.running(seed=1):
        yield
