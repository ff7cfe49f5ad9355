"""Reading the next few things while one is written, within a bound, into memory that is used again."""

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
# Bytes that things in memory may be together, if they are several; one that is larger is alone there. With
# what Python and torch take, a conversion needs at most the largest thing and a gigabyte.
TOGETHER = 700_000_000
# One ahead is not enough: behind a norm, which is written at once, the matrix after it would be waited for.
MOST = 4


class Rooms:
    """Memory for all that is read at the same time, by any thread.

    What is given back is kept by its size, for layers are alike, and fresh pages cost more than reading.
    """

    def __init__(self) -> None:
        self._changed = Condition()
        self._free: dict[int, list[bytearray]] = {}
        self._used = self._idle = self._waiting = 0

    def take(self, size: int, wait: bool) -> bytearray | None:
        """So many bytes, once there is room for them.

        Without `wait`, None if there is none yet, or if somebody waits already. Who waits must have none, or
        two could wait for each other.
        """
        with self._changed:
            if not wait and (self._waiting or not self._has_room(size)):
                return None
            self._waiting += 1
            self._changed.wait_for(lambda: self._has_room(size))
            self._waiting -= 1
            if self._free.get(size):
                self._used, self._idle = self._used + size, self._idle - size
                return self._free[size].pop()
            if self._used + self._idle + size > TOGETHER:
                self._free.clear()
                self._idle = 0
            memory = bytearray(size)
            self._used += size
            return memory

    def _has_room(self, size: int) -> bool:
        return not self._used or self._used + size <= TOGETHER

    def give(self, memory: bytearray) -> None:
        """Back, for others."""
        with self._changed:
            self._used -= len(memory)
            self._idle += len(memory)
            self._free.setdefault(len(memory), []).append(memory)
            self._changed.notify_all()


def loaded(
    items: Sequence[Item],
    load: Callable[[Item, bytearray], Loaded],
    need: Callable[[Item], int],
    rooms: Rooms,
) -> Iterator[tuple[Item, Loaded]]:
    """Each item with what `load` makes of it, in order.

    Args:
        load: is given memory of as many bytes as `need` says.

    The caller must let go of a thing before it asks for the next: its memory is used again.
    """
    coming, waiting = deque(items), deque()
    memory: bytearray | None = None
    with ThreadPoolExecutor(1) as reader:
        try:
            while coming or waiting:
                while coming and len(waiting) < MOST:
                    taken = rooms.take(need(coming[0]), wait=not waiting)
                    if taken is None:
                        break
                    item = coming.popleft()
                    waiting.append((item, taken, reader.submit(load, item, taken)))
                item, memory, loading = waiting.popleft()
                yield item, loading.result()
                del loading  # It holds what was loaded.
                rooms.give(memory)
                memory = None
        finally:
            reader.shutdown(cancel_futures=True)
            for taken in (memory, *(taken for _, taken, _ in waiting)):
                if taken is not None:
                    rooms.give(taken)


def tensor_in(memory: bytearray | memoryview, sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor that has the first bytes of the memory as its storage."""
    count = torch.Size(sizes).numel()
    if not count:
        return torch.empty(tuple(sizes), dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(*sizes)
