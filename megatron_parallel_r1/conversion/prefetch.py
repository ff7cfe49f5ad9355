"""Reads the next items while one is written, within a memory bound, into reused memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Condition
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")
# Most bytes of several items in memory at once; a larger item is in memory alone. With Python and torch, a
# conversion needs at most its largest item and one gigabyte.
MAX_BYTES = 700_000_000
# One is not enough: a norm is written at once, and the matrix after it would be waited for.
MAX_ITEMS = 4


class MemoryPool:
    """Memory for all items that are read at the same time, shared by threads.

    Returned memory is kept by its size: layers repeat sizes, and new pages cost more than reading.
    """

    def __init__(self) -> None:
        self._changed = Condition()
        self._free: dict[int, list[bytearray]] = {}
        self._used = self._idle = self._waiting = 0

    def take(self, size: int, wait: bool) -> bytearray | None:
        """Allocates `size` bytes as soon as they fit.

        Without `wait`, returns None if they do not fit yet, or if another thread waits. A waiting thread must
        hold no memory, or two could wait for each other.
        """
        with self._changed:
            if not wait and (self._waiting or not self._fits(size)):
                return None
            self._waiting += 1
            self._changed.wait_for(lambda: self._fits(size))
            self._waiting -= 1
            if self._free.get(size):
                self._used, self._idle = self._used + size, self._idle - size
                return self._free[size].pop()
            if self._used + self._idle + size > MAX_BYTES:
                self._free.clear()
                self._idle = 0
            memory = bytearray(size)
            self._used += size
            return memory

    def _fits(self, size: int) -> bool:
        return not self._used or self._used + size <= MAX_BYTES

    def give(self, memory: bytearray) -> None:
        """Returns memory to the pool."""
        with self._changed:
            self._used -= len(memory)
            self._idle += len(memory)
            self._free.setdefault(len(memory), []).append(memory)
            self._changed.notify_all()


def prefetch(
    items: Sequence[Item],
    load: Callable[[Item, bytearray], Loaded],
    need: Callable[[Item], int],
    pool: MemoryPool,
) -> Iterator[tuple[Item, Loaded]]:
    """Yields each item with the result of `load`, in order.

    The caller must drop a result before it asks for the next one: its memory is reused.

    Args:
        load: reads an item into memory of `need(item)` bytes.
    """
    coming, waiting = deque(items), deque()
    memory: bytearray | None = None
    with ThreadPoolExecutor(1) as reader:
        try:
            while coming or waiting:
                while coming and len(waiting) < MAX_ITEMS:
                    taken = pool.take(need(coming[0]), wait=not waiting)
                    if taken is None:
                        break
                    item = coming.popleft()
                    waiting.append((item, taken, reader.submit(load, item, taken)))
                item, memory, loading = waiting.popleft()
                yield item, loading.result()
                del loading  # it references the loaded result
                pool.give(memory)
                memory = None
        finally:
            reader.shutdown(cancel_futures=True)
            for taken in (memory, *(taken for _, taken, _ in waiting)):
                if taken is not None:
                    pool.give(taken)


def tensor_in(memory: bytearray | memoryview, sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Returns a tensor whose storage is the beginning of the memory."""
    count = torch.Size(sizes).numel()
    if not count:
        return torch.empty(tuple(sizes), dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(*sizes)
