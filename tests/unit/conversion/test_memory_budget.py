"""Files that are written at the same time share one memory budget."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_parallel_r1.conversion import work_folder

LIMIT = 80


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.integers(0, 120), max_size=10), min_size=2, max_size=3), st.booleans())
def test_several_share_the_budget_and_end(all_sizes: list[list[int]], fails: bool) -> None:
    """A weight above the limit waits until nothing else is in memory; a failure returns what it reserved."""
    budget, held, most, lock = (
        work_folder.MemoryBudget(),
        dict.fromkeys(range(len(all_sizes)), 0),
        [0],
        Lock(),
    )

    def convert(number: int) -> int:
        for count, size in enumerate(all_sizes[number]):
            with budget.reserve(size):
                with lock:
                    held[number] = size
                    several = sum(map(bool, held.values())) > 1
                    most[0] = max(most[0], sum(held.values()) if several else 0)
                time.sleep(0.0005)  # others want theirs now
                with lock:
                    held[number] = 0
                if fails and number == 0 and count == 1:
                    raise OSError("no more")
        return len(all_sizes[number])

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(len(all_sizes)) as threads:
        patch.setattr(work_folder, "MAX_BYTES", LIMIT)
        calls = [threads.submit(convert, number) for number in range(len(all_sizes))]
        errors = [call.exception(timeout=30) for call in calls]
    assert errors[1:] == [None] * (len(all_sizes) - 1)
    assert (errors[0] is not None) == (fails and len(all_sizes[0]) > 1)
    assert most[0] <= LIMIT
