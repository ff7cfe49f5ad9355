"""The rows of one forward pass, each one token of some context.

Shapes: N rows, T longest context.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import numpy as np
import torch
from numpy.typing import NDArray

Numbers = NDArray[np.int64]
# Rows attended together: start, stop, and the longest length among them.
Group = tuple[int, int, int]


@dataclass(frozen=True, eq=False, slots=True)
class ForwardBatch:
    """
    Attributes:
        tokens_N, positions_N: of each row.
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
