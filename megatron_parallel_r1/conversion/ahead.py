"""Reading the next thing while this one is written, as long as both are small."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")
# Bytes that two things in memory may be together; with what Python and torch take, less than a gigabyte.
BOTH = 700_000_000


def loaded(
    items: Sequence[Item], load: Callable[[Item], Loaded], size: Callable[[Item], int]
) -> Iterator[tuple[Item, Loaded]]:
    """Each item with what `load` makes of it, in order; `size` says how many bytes that will be.

    The caller must let go of a thing before it asks for the next.
    """
    with ThreadPoolExecutor(1) as reader:
        pending = None
        for number, item in enumerate(items):
            now = pending.result() if pending else load(item)
            pending = None
            if number + 1 < len(items) and size(item) + size(items[number + 1]) <= BOTH:
                pending = reader.submit(load, items[number + 1])
            yield item, now
            del now


class Rooms:
    """Memory for things read in turn, of which two exist at once: fresh pages cost more than reading.

    Things of which two may be in memory take turns in two rooms. Of larger ones no two are (`loaded`); they
    share a third.
    """

    def __init__(self) -> None:
        self._memory = [bytearray(), bytearray(), bytearray()]
        self._turn = 0

    def empty(self, sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor with a storage of its own, good until the next but one, a large one until the next."""
        count = torch.Size(sizes).numel()
        need = count * dtype.itemsize
        if not need:
            return torch.empty(tuple(sizes), dtype=dtype)
        room = 2
        if need <= BOTH // 2:
            self._turn = room = 1 - self._turn
        if len(self._memory[room]) < need:
            self._memory[room] = bytearray()  # The old one goes before the new one comes.
            self._memory[room] = bytearray(need)
        return torch.frombuffer(self._memory[room], dtype=dtype, count=count).view(*sizes)
