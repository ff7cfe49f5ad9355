"""An endless order over problems that is set by its seed and resumed from one integer."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


class Shuffled(Generic[T]):
    """Maps a position 0, 1, 2, … to an item: one permutation of `items` an epoch, each its own."""

    def __init__(self, items: Sequence[T], seed: int) -> None:
        if not items:
            raise ValueError("nothing to draw from: the list of problems is empty")
        self._items = items
        self._seed = seed
        self._epoch = -1
        self._order: list[int] = []

    def __call__(self, position: int) -> T:
        epoch, place = divmod(position, len(self._items))
        if epoch != self._epoch:
            self._order = list(range(len(self._items)))
            random.Random(f"order/{self._seed}/{epoch}").shuffle(self._order)
            self._epoch = epoch
        return self._items[self._order[place]]


class ProblemStream(Generic[T]):
    """Batches without end.

    Args:
        source: items to go through in shuffled epochs, all in memory, or a function from a position to its
            item, such as the embedded curriculum's generators, or `stream.StreamedShuffle` for large files.
        seed: of the shuffle; a generating function has its own.
    """

    def __init__(self, source: Sequence[T] | Callable[[int], T], seed: int) -> None:
        self._at = source if callable(source) else Shuffled(source, seed)
        self._position = 0

    def next_batch(self, size: int) -> tuple[T, ...]:
        """The next `size` items."""
        start, self._position = self._position, self._position + size
        return tuple(self._at(position) for position in range(start, self._position))

    def state(self) -> dict[str, int]:
        """What `restore` needs, JSON-ready: how many items have been handed out."""
        return {"position": self._position}

    def restore(self, state: dict[str, int]) -> None:
        """Goes on as a stream of the same source and seed would after `state`."""
        self._position = state["position"]
