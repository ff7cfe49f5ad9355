"""What goes through the model in one pass: rows, each one token of some context.

Shapes: N rows, T longest context.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import numpy as np
import torch
from numpy.typing import NDArray

Numbers = NDArray[np.int64]
# Rows that are attended together, first and behind the last, and the longest length among them.
Group = tuple[int, int, int]


@dataclass(frozen=True, eq=False, slots=True)
class ForwardBatch:
    """
    Attributes:
        tokens_N, positions_N: of each row.
        slots_N: where its key and value are written.
        seen_NT: slots that it sees, its own last; padded with any slot number.
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
        """The same rows by falling length, and the new place of each."""
        order_N = np.argsort(-self.lengths_N, kind="stable")
        places_N = np.empty_like(order_N)
        places_N[order_N] = np.arange(len(order_N))
        return ForwardBatch(*(getattr(self, field.name)[order_N] for field in fields(self))), places_N

    def groups(self, most_cells: int) -> list[Group]:
        """Cuts rows of falling length into such of similar length, each at most `most_cells` (row, slot)
        pairs; a row that is longer stands alone."""
        lengths, start, groups = self.lengths_N.tolist(), 0, []
        while start < len(lengths):
            stop = min(start + max(1, most_cells // lengths[start]), len(lengths))
            groups.append((start, stop, lengths[start]))
            start = stop
        return groups


@dataclass(slots=True)
class NativeContext:
    """A row of the slot table. While a `sample` call is under way, draws.py keeps what moves.

    Attributes:
        position: of the next token.
        pending: tokens that are part of the context but not in the cache yet.
        logits_V: for the next token, until one is drawn; of a team, rank 0 alone has all of them.
        version: of the weights that made `logits_V`.
    """

    row: int
    position: int = 0
    pending: list[int] = field(default_factory=list)
    logits_V: torch.Tensor | None = None
    version: int = -1
