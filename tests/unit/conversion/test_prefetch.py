"""What is read ahead lies in memory that is used again, and never over what is still being written."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_parallel_r1.conversion import prefetch


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 30), max_size=12))
def test_each_is_whole_while_it_is_used_and_few_are_there(sizes: list[int]) -> None:
    there, most = 0, 0

    def need(item: tuple[int, int]) -> int:
        return 4 * item[1]

    def load(item: tuple[int, int], memory: bytearray) -> torch.Tensor:
        nonlocal there, most
        there += need(item)
        most = max(most, there if there > need(item) else 0)
        return prefetch.tensor_in(memory, (item[1],), torch.float32).fill_(item[0])

    items = list(enumerate(sizes))
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefetch, "MAX_BYTES", 80)  # bytes: of numbers of 4, two of 10 are in memory together
        for item, tensor in prefetch.prefetch(items, load, need, prefetch.MemoryPool()):
            time.sleep(0.0005)  # Others are being loaded now.
            assert tensor.tolist() == [item[0]] * item[1]
            assert tensor.untyped_storage().nbytes() == need(item)
            seen.append(item)
            there -= need(item)
    assert seen == items
    assert most <= 80


def test_an_error_of_the_reader_comes_in_its_turn() -> None:
    def load(item: int, memory: bytearray) -> int:
        if item == 2:
            raise OSError("no more")
        return item

    found = []
    with pytest.raises(OSError, match="no more"):
        for item, _ in prefetch.prefetch([0, 1, 2, 3], load, lambda item: 8, prefetch.MemoryPool()):
            found.append(item)
    assert found == [0, 1]


@settings(deadline=None, max_examples=20)
@given(st.lists(st.lists(st.integers(0, 30), max_size=10), min_size=2, max_size=3), st.booleans())
def test_several_share_the_memory_and_end(all_sizes: list[list[int]], fails: bool) -> None:
    """Larger ones wait until nobody else has any; one that fails gives back what it had."""
    rooms, there, most, lock = prefetch.MemoryPool(), {}, [0], Lock()

    def convert(number: int) -> list[int]:
        def load(size: int, memory: bytearray) -> bytearray:
            with lock:
                there[id(memory)] = len(memory)
                most[0] = max(most[0], sum(there.values()) if sum(map(bool, there.values())) > 1 else 0)
            return memory

        done = []
        for size, memory in prefetch.prefetch(all_sizes[number], load, lambda size: 4 * size, rooms):
            if fails and number == 0 and len(done) == 2:
                return done
            done.append(size)
            with lock:
                there[id(memory)] = 0
        return done

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(len(all_sizes)) as threads:
        patch.setattr(prefetch, "MAX_BYTES", 80)
        done = list(threads.map(convert, range(len(all_sizes)), timeout=30))
    assert done[1:] == all_sizes[1:] and done[0] == (all_sizes[0][:2] if fails else all_sizes[0])
    if not fails:
        assert most[0] <= 80
