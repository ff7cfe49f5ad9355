"""What is read ahead lies in memory that is used again, and never over what is still being written."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_parallel_r1.conversion import ahead


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 30), max_size=12))
def test_each_is_whole_while_it_is_used(sizes: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ahead, "BOTH", 80)  # bytes: of numbers of 4, two of 10 are in memory together
        rooms, alive = ahead.Rooms(), []

        def load(item: tuple[int, int]) -> torch.Tensor:
            number, size = item
            alive.append(4 * size)
            return rooms.empty((size,), torch.float32).fill_(number)

        items = list(enumerate(sizes))
        for (number, size), tensor in ahead.loaded(items, load, lambda item: 4 * item[1]):
            time.sleep(0.0005)  # The next one is being loaded now.
            assert tensor.tolist() == [number] * size and tensor.untyped_storage().nbytes() == 4 * size
    assert alive == [4 * size for size in sizes]


def test_rooms_are_used_again_and_grow() -> None:
    rooms = ahead.Rooms()
    first, second, third = (rooms.empty((4,), torch.float32) for _ in range(3))
    assert first.data_ptr() == third.data_ptr() != second.data_ptr()
    assert rooms.empty((1000,), torch.float32).shape == (1000,)
    assert rooms.empty((0, 3), torch.float32).numel() == 0
