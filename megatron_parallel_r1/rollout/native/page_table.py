"""Contexts, their cache slots, shared by reference counts, and the rows of a pass; a page holds one token.

A slot holds the key and value of one token in every layer. A fork copies slot numbers, never keys; a join
appends the paths' slot numbers to the trunk's.

Shapes: C contexts, T tokens of the longest context, S slots, N slots allocated at once or rows of a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from numpy.typing import NDArray

Numbers = NDArray[np.int64]


class PageTable:
    """Grows by doubling, so that its size follows the work and not a setting."""

    def __init__(self, contexts: int = 64, tokens: int = 64, slots: int = 4096) -> None:
        self.slots_CT = np.zeros((contexts, tokens), np.int64)
        self.lengths_C = np.zeros(contexts, np.int64)
        self._free_rows = list(range(contexts))
        self._references_S = np.zeros(slots, np.int32)
        self._free_slots_S = np.arange(slots, dtype=np.int64)
        self._free_count = slots

    @property
    def slot_count(self) -> int:
        return len(self._references_S)

    @property
    def used(self) -> int:
        """Slots that some context sees."""
        return self.slot_count - self._free_count

    def slots_with(self, count: int) -> int:
        """Size of the table after `count` more slots are allocated."""
        slots = self.slot_count
        while slots - self.used < count:
            slots *= 2
        return slots

    def open(self) -> int:
        """The row of a new, empty context."""
        if not self._free_rows:
            rows = len(self.lengths_C)
            self.slots_CT = np.concatenate([self.slots_CT, np.zeros_like(self.slots_CT)])
            self.lengths_C = np.concatenate([self.lengths_C, np.zeros_like(self.lengths_C)])
            self._free_rows = list(range(rows, 2 * rows))
        row = self._free_rows.pop()
        self.lengths_C[row] = 0
        return row

    def extend(self, rows_N: Numbers, indices_N: Numbers) -> Numbers:
        """Allocates one slot per entry and returns their numbers.

        Args:
            rows_N: contexts; one that gets several slots occurs that often.
            indices_N: where in its context each slot stands: after the existing ones, in order.
        """
        count = len(rows_N)
        while self._free_count < count:
            self._grow_slots()
        self._free_count -= count
        new_N = self._free_slots_S[self._free_count : self._free_count + count].copy()
        self._references_S[new_N] = 1
        self._reserve(int(indices_N.max()) + 1)
        self.slots_CT[rows_N, indices_N] = new_N
        np.maximum.at(self.lengths_C, rows_N, indices_N + 1)
        return new_N

    def fork(self, row: int) -> int:
        """A context that sees the same slots."""
        return self.join(row, ())

    def join(self, trunk: int, paths: Sequence[int]) -> int:
        """A context that sees the trunk's slots, then each path's slots after the trunk."""
        joined = self.open()
        shared = self.lengths_C[trunk]
        for row, start in ((trunk, 0), *((path, shared) for path in paths)):
            seen = self.slots_CT[row, start : self.lengths_C[row]].copy()
            self._references_S[seen] += 1
            self._append(joined, seen)
        return joined

    def close(self, row: int) -> None:
        seen = self.slots_CT[row, : self.lengths_C[row]]
        self._references_S[seen] -= 1
        freed = seen[self._references_S[seen] == 0]
        self._free_slots_S[self._free_count : self._free_count + len(freed)] = freed
        self._free_count += len(freed)
        self.lengths_C[row] = 0
        self._free_rows.append(row)

    def _append(self, row: int, slots: Numbers) -> None:
        start = self.lengths_C[row]
        self._reserve(start + len(slots))
        self.slots_CT[row, start : start + len(slots)] = slots
        self.lengths_C[row] += len(slots)

    def _reserve(self, tokens: int) -> None:
        """Makes room for contexts of `tokens` tokens."""
        while tokens > self.slots_CT.shape[1]:
            self.slots_CT = np.concatenate([self.slots_CT, np.zeros_like(self.slots_CT)], axis=1)

    def _grow_slots(self) -> None:
        old = self.slot_count
        new = np.arange(old, 2 * old, dtype=np.int64)
        free = np.concatenate([self._free_slots_S[: self._free_count], new])
        self._free_slots_S = np.concatenate([free, np.zeros(2 * old - len(free), np.int64)])
        self._free_count += old
        self._references_S = np.concatenate([self._references_S, np.zeros_like(self._references_S)])


# Rows attended together: start, stop, and the longest length among them.
Group = tuple[int, int, int]


@dataclass(frozen=True, eq=False, slots=True)
class ForwardBatch:
    """The rows of one forward pass, each one token of some context.

    Attributes:
        slots_N: cache slots that the rows' keys and values are written to.
        seen_NT: slots that each row sees, its own last; padded with any slot number.
        lengths_N: how many of those count.
    """

    tokens_N: Numbers
    positions_N: Numbers
    slots_N: Numbers
    seen_NT: Numbers
    lengths_N: Numbers

    def __len__(self) -> int:
        return len(self.tokens_N)

    def longest_first(self) -> tuple[ForwardBatch, Numbers]:
        """The same rows by decreasing length, and the new index of each."""
        order_N = np.argsort(-self.lengths_N, kind="stable")
        places_N = np.empty_like(order_N)
        places_N[order_N] = np.arange(len(order_N))
        return ForwardBatch(*(getattr(self, field.name)[order_N] for field in fields(self))), places_N

    def groups(self, max_cells: int) -> list[Group]:
        """Cuts rows of decreasing length into groups of similar length, each at most `max_cells` (row, slot)
        pairs; a longer row stands alone."""
        lengths, start, groups = self.lengths_N.tolist(), 0, []
        while start < len(lengths):
            stop = min(start + max(1, max_cells // lengths[start]), len(lengths))
            groups.append((start, stop, lengths[start]))
            start = stop
        return groups


@dataclass(slots=True)
class NativeContext:
    """A row of the page table. During a `sample` call `running_batch.py` keeps its moving parts.

    Attributes:
        position: of the next token.
        pending: tokens that belong to the context but are not in the cache yet.
        logits_V: for the next token, until one is drawn; in a tensor-parallel group only rank 0 has all.
        version: of the weights that computed `logits_V`.
    """

    row: int
    position: int = 0
    pending: list[int] = field(default_factory=list)
    logits_V: torch.Tensor | None = None
    version: int = -1
