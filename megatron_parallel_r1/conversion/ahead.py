"""Reading the next thing while this one is written, as long as both are small."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")
BOTH = 2**28  # bytes that two things in memory may be; a larger one is alone there


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
    """Memory for things read in turn, of which two exist at once: fresh pages cost more than reading."""

    def __init__(self) -> None:
        self._memory = [bytearray(), bytearray()]
        self._turn = 0

    def empty(self, sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor with a storage of its own, good until the next but one; a large one is fresh memory."""
        count = torch.Size(sizes).numel()
        need = count * dtype.itemsize
        if need > BOTH // 2 or not need:
            return torch.empty(sizes, dtype=dtype)
        self._turn = 1 - self._turn
        if len(self._memory[self._turn]) < need:
            self._memory[self._turn] = bytearray(need)
        return torch.frombuffer(self._memory[self._turn], dtype=dtype, count=count).view(*sizes)
