"""Finds the key tiles that a query tile needs under a layout, by interval arithmetic; and a cache by layout.

A layout gives for each query the start of its document and the hidden key intervals (thought/layout.py).
Queries are split into tiles of M, keys into tiles of N. For each pair of tiles the layout's bounds tell
whether all queries see all keys, some see some, or none sees any.

Shapes: Q queries of this rank, L keys of the row (more than Q under context parallelism), S keys of a
span, K rows of the layout, d hidden intervals, I query tiles, J key tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(frozen=True, eq=False, slots=True)
class TileVisibility:
    """The visibility of key tiles for query tiles.

    Attributes:
        needed_IJ: some query may see some key.
        whole_IJ: all queries see all keys, and the key tile lies entirely within the row.
    """

    needed_IJ: Tensor
    whole_IJ: Tensor


def tile_visibility(layout_KQ: Tensor, keys: int, query_tile: int, key_tile: int) -> TileVisibility:
    """Computes the visibility from the layout's bounds over each query tile, without a [Q, L] mask.

    A tile is not needed if it lies outside [start of document, query] for all queries, or within an interval
    that is hidden from all of them. A key tile that no query sees may be marked as needed; one that some
    query sees is never missing.

    Args:
        keys: L.
        query_tile, key_tile: M and N.
    """
    repeats = -layout_KQ.shape[1] % query_tile
    # Repeating the last query fills the last tile and changes no bound.
    filled_KQ = torch.cat([layout_KQ, layout_KQ[:, -1:].expand(-1, repeats)], 1)
    index_IM, start_IM, *hidden_IM = filled_KQ.unflatten(1, (-1, query_tile))
    key_lo_J = torch.arange(0, keys, key_tile, device=layout_KQ.device, dtype=torch.int32)
    key_hi_J = key_lo_J + key_tile

    # What some query may see of a key tile, and what all see apart from hidden intervals.
    some_lo_IJ = torch.maximum(key_lo_J, start_IM.amin(1, keepdim=True))
    some_hi_IJ = torch.minimum(key_hi_J, index_IM.amax(1, keepdim=True) + 1)
    needed_IJ = some_lo_IJ < some_hi_IJ
    whole_IJ = (start_IM.amax(1, keepdim=True) <= key_lo_J) & (key_hi_J <= index_IM.amin(1, keepdim=True) + 1)
    for lo_IM, hi_IM in zip(hidden_IM[::2], hidden_IM[1::2], strict=True):
        # Hidden from all: within the intersection of their intervals. Clear for all: outside their hull.
        hidden_lo_I1, hidden_hi_I1 = lo_IM.amax(1, keepdim=True), hi_IM.amin(1, keepdim=True)
        needed_IJ &= (some_lo_IJ < hidden_lo_I1) | (hidden_hi_I1 < some_hi_IJ)
        unused_IM = lo_IM >= hi_IM
        hull_lo_I1 = lo_IM.masked_fill(unused_IM, keys + key_tile).amin(1, keepdim=True)
        hull_hi_I1 = hi_IM.masked_fill(unused_IM, 0).amax(1, keepdim=True)
        whole_IJ &= (key_hi_J <= hull_lo_I1) | (hull_hi_I1 <= key_lo_J)
    return TileVisibility(needed_IJ, whole_IJ)


@dataclass(frozen=True, eq=False, slots=True)
class TileLists:
    """For each tile of one side, the needed tiles of the other, ascending within each of the two kinds.

    The lists of a whole row have at most L² / (M N) int32 numbers: at tiles of 128 by 64 one per 8192 pairs.

    Attributes:
        tiles_IJ: int32, first the whole ones, then those that need a mask, then entries not to be read.
        whole_I, needed_I: int32, the number of whole ones, and of both kinds.
    """

    tiles_IJ: Tensor
    whole_I: Tensor
    needed_I: Tensor


def tile_lists(visibility: TileVisibility) -> TileLists:
    """Lists the key tiles of each query tile, without waiting for the device."""
    rank_IJ = 2 - visibility.needed_IJ.to(torch.uint8) - visibility.whole_IJ.to(torch.uint8)
    return TileLists(
        rank_IJ.argsort(dim=1, stable=True).int().contiguous(),
        visibility.whole_IJ.sum(1, dtype=torch.int32),
        visibility.needed_IJ.sum(1, dtype=torch.int32),
    )


def transposed(visibility: TileVisibility) -> TileVisibility:
    """Returns the visibility of query tiles for key tiles."""
    return TileVisibility(visibility.needed_IJ.T, visibility.whole_IJ.T)


@dataclass(frozen=True, slots=True)
class KeySpan:
    """Consecutive keys start..stop that a query tile needs; `masked` if some pairs are hidden."""

    start: int
    stop: int
    masked: bool


@dataclass(frozen=True, slots=True)
class QueryTile:
    """Queries start..stop and the keys that at least one of them sees."""

    start: int
    stop: int
    spans: tuple[KeySpan, ...]


def plan_tiles(layout_KQ: Tensor, keys: int, tile: int) -> list[QueryTile]:
    """Plans the spans of L `keys` that each query tile needs, on the host; `tile` is M = N."""
    visibility = tile_visibility(layout_KQ, keys, tile, tile)
    plan = []
    for i, (needed_J, whole_J) in enumerate(
        zip(visibility.needed_IJ.tolist(), visibility.whole_IJ.tolist(), strict=True)
    ):
        spans: list[KeySpan] = []
        for j in (j for j, needed in enumerate(needed_J) if needed):
            start, stop, masked = j * tile, min((j + 1) * tile, keys), not whole_J[j]
            if spans and spans[-1].stop == start and spans[-1].masked == masked:
                start = spans.pop().start
            spans.append(KeySpan(start, stop, masked))
        plan.append(QueryTile(i * tile, min((i + 1) * tile, layout_KQ.shape[1]), tuple(spans)))
    return plan


def visible(layout_KM: Tensor, start: int, stop: int) -> Tensor:
    """Returns the mask [M, stop - start] of a tile: whether each query sees each key under the layout."""
    key_S = torch.arange(start, stop, device=layout_KM.device)
    columns_KM1 = layout_KM.unsqueeze(-1)
    seen_MS = (columns_KM1[1] <= key_S) & (key_S <= columns_KM1[0])
    for lo_M1, hi_M1 in zip(columns_KM1[2::2], columns_KM1[3::2], strict=True):
        seen_MS &= (key_S < lo_M1) | (hi_M1 <= key_S)
    return seen_MS


Cached = TypeVar("Cached")


class LayoutCache:
    """Keyed by the tensor object, not by its values: comparing those would wait for the device.

    Activation checkpointing passes its layers a new tensor with the same values, which is a new entry.
    """

    def __init__(self) -> None:
        self._values = WeakTensorKeyDictionary()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, layout_KQ: Tensor, key: Hashable, compute: Callable[[], Cached]) -> Cached:
        """Returns the cached value, or computes it; a layout that was written to is computed again.

        Args:
            key: everything else that the value depends on.
        """
        values: dict[Hashable, Cached] = self._values.setdefault(layout_KQ, {})
        key = (layout_KQ._version, key)
        if key not in values:
            values[key] = compute()
        return values[key]
