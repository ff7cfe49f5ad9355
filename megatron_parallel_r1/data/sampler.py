"""Endless, seeded orders over a data set, resumed from one integer: in memory, or streamed from large files.

For a streamed data set, the rows are cut into chunks of neighbours. Each epoch shuffles the chunks and goes
through them one buffer at a time: it reads as many chunks as fit and shuffles their rows. Seed and position
alone decide which item stands at a position, so resuming a stream reads one buffer. A chunk is at most a
sixteenth of the buffer, so that neighbours in a file rarely share a batch.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
RowLocation = tuple[int, int]
"""The index of a table, and the number of a row in it."""
Int64 = NDArray[np.int64]

_CHUNKS_PER_BUFFER = 16
_CHOICES_AT_ONCE = 1 << 16
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio


class ShuffledEpochs(Generic[T]):
    """Maps a position 0, 1, 2, … to an item; each epoch is a permutation of `items` of its own."""

    def __init__(self, items: Sequence[T], seed: int) -> None:
        if not items:
            raise ValueError("nothing to draw from: the list of problems is empty")
        self._items = items
        self._seed = seed
        self._epoch = -1
        self._order: list[int] = []

    def __call__(self, position: int) -> T:
        epoch, index = divmod(position, len(self._items))
        if epoch != self._epoch:
            self._order = list(range(len(self._items)))
            random.Random(f"order/{self._seed}/{epoch}").shuffle(self._order)
            self._epoch = epoch
        return self._items[self._order[index]]


class StreamedShuffle(Generic[T]):
    """Maps a position 0, 1, 2, … to an item, for `ProblemStream`; fast where positions rise one by one.

    Args:
        rows: for each table, the rising numbers of its usable rows.
        load: reads the items at rising locations.
        buffer: the maximum number of items in memory.
        seed: seed of the order.

    Raises:
        ValueError: there are no rows, or `buffer` is not positive.
    """

    def __init__(
        self,
        rows: Sequence[Int64],
        load: Callable[[Sequence[RowLocation]], Iterable[T]],
        buffer: int,
        seed: int,
    ) -> None:
        if buffer < 1 or not any(map(len, rows)):
            raise ValueError(f"a buffer of {buffer} for {sum(map(len, rows))} rows: both must be positive")
        size = max(1, buffer // _CHUNKS_PER_BUFFER)
        self._chunks = [
            (table, rows_N[start : start + size])
            for table, rows_N in enumerate(rows)
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
        """The number of items of an epoch."""
        return self._size

    def __call__(self, position: int) -> T:
        epoch, index = divmod(position, self._size)
        if epoch != self._epoch:
            self._begin(epoch)
        window = bisect_right(self._starts, index) - 1
        if window != self._window:
            self._fill(window)
        return self._items[index - self._starts[window]]

    def _begin(self, epoch: int) -> None:
        """Shuffles the chunks and groups them into windows that fit the buffer."""
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
        self._items = []  # freed before the next window is read: memory holds one buffer, not two
        chunks = sorted(self._windows[window])
        locations = [(self._chunks[c][0], int(row)) for c in chunks for row in self._chunks[c][1]]
        items = list(self._load(locations))
        random.Random(f"rows/{self._seed}/{self._epoch}/{window}").shuffle(items)
        self._items, self._window = items, window


class MixedOrder(Generic[T]):
    """Maps a position 0, 1, 2, … to an item of one of several orders, in proportion to their weights.

    A Weyl sequence, n times the golden ratio modulo 1, chooses the order: of any n neighbours an order of
    share w gets w n items, up to a few. Each order goes through its own positions one by one. Position and
    seed alone decide, so that one integer resumes a mixture.
    """

    def __init__(self, orders: Sequence[Callable[[int], T]], weights: Sequence[float], seed: int) -> None:
        self._orders = orders
        shares = np.cumsum(weights) / np.sum(weights)
        self._bounds = (shares[:-1] * 2.0**64).astype(np.uint64)
        self._start = random.Random(f"mixture/{seed}").getrandbits(64)
        self._next, self._drawn = 0, np.zeros(len(orders), np.int64)

    def __call__(self, position: int) -> T:
        if position < self._next:
            self._next, self._drawn = 0, np.zeros(len(self._orders), np.int64)
        while self._next < position:
            stop = min(position, self._next + _CHOICES_AT_ONCE)
            self._drawn += np.bincount(self._choices(self._next, stop), minlength=len(self._orders))
            self._next = stop
        (choice,) = self._choices(position, position + 1).tolist()
        item = self._orders[choice](int(self._drawn[choice]))
        self._drawn[choice] += 1
        self._next = position + 1
        return item

    def _choices(self, start: int, stop: int) -> Int64:
        steps_N = np.arange(start, stop, dtype=np.uint64) * np.uint64(_GOLDEN)  # modulo 2^64
        return np.searchsorted(self._bounds, steps_N + np.uint64(self._start), side="right")


class ProblemStream(Generic[T]):
    """An endless stream of batches.

    Args:
        source: items in memory, which the stream shuffles in epochs, or a function from a position to its
            item, such as a generator of the embedded curriculum or a `StreamedShuffle`.
        seed: seed of the shuffle; a function has its own.
    """

    def __init__(self, source: Sequence[T] | Callable[[int], T], seed: int) -> None:
        self._item_at: Callable[[int], T] = source if callable(source) else ShuffledEpochs(source, seed)
        self._position = 0
        self._begins: dict[int, int] = {}

    def begin_step(self, step: int) -> None:
        """Records that the batches of a training step begin here."""
        self._begins[step] = self._position

    def next_batch(self, size: int) -> tuple[T, ...]:
        """Returns the next `size` items."""
        start, self._position = self._position, self._position + size
        return tuple(self._item_at(position) for position in range(start, self._position))

    def state(self) -> dict[str, int]:
        """Returns the JSON-ready state for `restore`: the number of items drawn so far."""
        return {"position": self._position}

    def state_after(self, step: int) -> dict[str, int]:
        """Returns the state before the batches of the next step were drawn, if any were."""
        return {"position": self._begins.get(step + 1, self._position)}

    def restore(self, state: dict[str, int]) -> None:
        """Continues as a stream of the same source and seed would after `state`."""
        self._position = state["position"]
