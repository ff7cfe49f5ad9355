"""Reading the next few things while one is written, within a bound, into memory that is used again."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")
# Bytes that things in memory may be together, if they are several; with what Python and torch take, less than
# a gigabyte. One that is larger is alone there.
TOGETHER = 700_000_000
# One ahead is not enough: behind a norm, which is written at once, the matrix after it would be waited for.
MOST = 4


def loaded(
    items: Sequence[Item], load: Callable[[Item, bytearray], Loaded], need: Callable[[Item], int]
) -> Iterator[tuple[Item, Loaded]]:
    """Each item with what `load` makes of it, in order.

    Args:
        load: is given memory of as many bytes as `need` says.

    The caller must let go of a thing before it asks for the next: its memory is used again.
    """
    rooms, coming, waiting, used = _Rooms(), deque(items), deque(), 0
    with ThreadPoolExecutor(1) as reader:
        try:
            while coming or waiting:
                while coming and len(waiting) < MOST and (not used or used + need(coming[0]) <= TOGETHER):
                    item = coming.popleft()
                    memory = rooms.take(need(item))
                    used += len(memory)
                    waiting.append((item, memory, reader.submit(load, item, memory)))
                item, memory, loading = waiting.popleft()
                yield item, loading.result()
                used -= len(memory)
                rooms.give(memory)
        finally:
            reader.shutdown(cancel_futures=True)


class _Rooms:
    """Memory by size, for layers are alike: fresh pages cost more than reading."""

    def __init__(self) -> None:
        self._free: dict[int, list[bytearray]] = {}
        self._idle = 0

    def take(self, size: int) -> bytearray:
        if self._free.get(size):
            self._idle -= size
            return self._free[size].pop()
        if self._idle + size > TOGETHER // 2:
            self._free.clear()
            self._idle = 0
        return bytearray(size)

    def give(self, memory: bytearray) -> None:
        self._free.setdefault(len(memory), []).append(memory)
        self._idle += len(memory)


def tensor_in(memory: bytearray, sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor that has the first bytes of the memory as its storage."""
    count = torch.Size(sizes).numel()
    if not count:
        return torch.empty(tuple(sizes), dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(*sizes)
