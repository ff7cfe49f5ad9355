"""A shuffle of files that are too large to hold: bounded memory, and a position that is one integer.

The rows are cut into chunks of neighbours. Each epoch puts the chunks into an order of its own and goes
through them a buffer at a time: as many chunks as fit are read, and their rows shuffled. What stands at a
position follows from seed and position alone, so a stream is resumed by reading one buffer. A chunk is a
sixteenth of the buffer at most, so that neighbours in a file rarely meet in a batch.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
Place = tuple[int, int]
Int64 = NDArray[np.int64]

_CHUNKS_A_BUFFER = 16


class StreamedShuffle(Generic[T]):
    """Maps a position 0, 1, 2, … to an item, for `ProblemStream`; quick where positions rise one by one.

    Args:
        rows: of each shard, the numbers of its rows that are of use, rising.
        load: reads the items at rising places (shard, row).
        buffer: items in memory at most.
        seed: of the order.

    Raises:
        ValueError: there are no rows, or `buffer` is not positive.
    """

    def __init__(
        self, rows: Sequence[Int64], load: Callable[[Sequence[Place]], Iterable[T]], buffer: int, seed: int
    ) -> None:
        if buffer < 1 or not any(map(len, rows)):
            raise ValueError(f"a buffer of {buffer} for {sum(map(len, rows))} rows: both must be positive")
        size = max(1, buffer // _CHUNKS_A_BUFFER)
        self._chunks = [
            (shard, rows_N[start : start + size])
            for shard, rows_N in enumerate(rows)
            for start in range(0, len(rows_N), size)
        ]
        self._size = sum(map(len, rows))
        self._load = load
        self._buffer = buffer
        self._seed = seed
        self._epoch = -1
        self._windows: list[list[int]] = []
        self._starts: list[int] = []
        self._window = -1
        self._items: list[T] = []

    def __len__(self) -> int:
        """Items of an epoch."""
        return self._size

    def __call__(self, position: int) -> T:
        epoch, place = divmod(position, self._size)
        if epoch != self._epoch:
            self._begin(epoch)
        window = bisect_right(self._starts, place) - 1
        if window != self._window:
            self._fill(window)
        return self._items[place - self._starts[window]]

    def _begin(self, epoch: int) -> None:
        """Orders the chunks and parts them into windows that fit the buffer."""
        order = list(range(len(self._chunks)))
        random.Random(f"chunks/{self._seed}/{epoch}").shuffle(order)
        self._windows, self._starts = [], []
        position, room = 0, 0
        for chunk in order:
            length = len(self._chunks[chunk][1])
            if length > room:
                self._windows.append([])
                self._starts.append(position)
                room = self._buffer
            self._windows[-1].append(chunk)
            room -= length
            position += length
        self._epoch, self._window = epoch, -1

    def _fill(self, window: int) -> None:
        self._items = []  # before the next are read: memory holds one buffer, not two
        chunks = sorted(self._windows[window])
        places = [(self._chunks[c][0], int(row)) for c in chunks for row in self._chunks[c][1]]
        items = list(self._load(places))
        random.Random(f"rows/{self._seed}/{self._epoch}/{window}").shuffle(items)
        self._items, self._window = items, window
