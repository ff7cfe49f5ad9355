"""Which tiles of keys a tile of queries needs under a layout, by interval arithmetic.

A layout says for each query where its document starts and which key intervals it must not see
(thought/layout.py). Queries are cut into tiles of M, keys into tiles of N. For each pair of tiles the bounds
of the layout tell whether all of the queries see all of the keys, some see some, or none sees any.

Shapes: Q queries of this process, L keys of the row (more than Q under context parallelism), S keys of a
span, K rows of the layout, d hidden intervals, I query tiles, J key tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Sight:
    """What tiles of queries see of tiles of keys.

    Attributes:
        needed_IJ: some query may see some key.
        whole_IJ: all queries see all keys, and the key tile is not cut off by the end of the row.
    """

    needed_IJ: Tensor
    whole_IJ: Tensor


def tile_sight(layout_KQ: Tensor, keys: int, query_tile: int, key_tile: int) -> Sight:
    """What tiles see, from the layout's bounds over each query tile and never a [Q, L] mask.

    A tile is not needed if it lies outside [start of document, query] for all queries, or within one interval
    that all of them hide. A key tile that nobody sees may at times be called needed; one that somebody sees
    is never left out.

    Args:
        layout_KQ: int32 layout of the queries.
        keys: L.
        query_tile, key_tile: M and N.
    """
    repeats = -layout_KQ.shape[1] % query_tile
    # The last query over and over fills the last tile and changes no bound.
    filled_KQ = torch.cat([layout_KQ, layout_KQ[:, -1:].expand(-1, repeats)], 1)
    index_IM, start_IM, *hidden_IM = filled_KQ.unflatten(1, (-1, query_tile))
    key_lo_J = torch.arange(0, keys, key_tile, device=layout_KQ.device, dtype=torch.int32)
    key_hi_J = key_lo_J + key_tile

    # What some query may see of a key tile, and what all of them see but for the hidden intervals.
    some_lo_IJ = torch.maximum(key_lo_J, start_IM.amin(1, keepdim=True))
    some_hi_IJ = torch.minimum(key_hi_J, index_IM.amax(1, keepdim=True) + 1)
    needed_IJ = some_lo_IJ < some_hi_IJ
    whole_IJ = (start_IM.amax(1, keepdim=True) <= key_lo_J) & (key_hi_J <= index_IM.amin(1, keepdim=True) + 1)
    for lo_IM, hi_IM in zip(hidden_IM[::2], hidden_IM[1::2], strict=True):
        # Hidden from all: within what their intervals have in common. Clear for all: outside of the hull.
        hidden_lo_I1, hidden_hi_I1 = lo_IM.amax(1, keepdim=True), hi_IM.amin(1, keepdim=True)
        needed_IJ &= (some_lo_IJ < hidden_lo_I1) | (hidden_hi_I1 < some_hi_IJ)
        unused_IM = lo_IM >= hi_IM
        hull_lo_I1 = lo_IM.masked_fill(unused_IM, keys + key_tile).amin(1, keepdim=True)
        hull_hi_I1 = hi_IM.masked_fill(unused_IM, 0).amax(1, keepdim=True)
        whole_IJ &= (key_hi_J <= hull_lo_I1) | (hull_hi_I1 <= key_lo_J)
    return Sight(needed_IJ, whole_IJ)


@dataclass(frozen=True, eq=False, slots=True)
class TileLists:
    """For each tile of one side the tiles of the other that it needs, rising within each of the two kinds.

    A list is L² / (M N) int32 numbers at most for the whole row: at tiles of 128 by 64 one for 8192 pairs.

    Attributes:
        tiles_IJ: int32, first those that are whole, then those that need a mask, then what is not to be read.
        whole_I, needed_I: int32, how many are whole, and how many are of either kind.
    """

    tiles_IJ: Tensor
    whole_I: Tensor
    needed_I: Tensor


def tile_lists(sight: Sight) -> TileLists:
    """The key tiles of each query tile. Nothing waits for the device."""
    rank_IJ = 2 - sight.needed_IJ.to(torch.uint8) - sight.whole_IJ.to(torch.uint8)
    return TileLists(
        rank_IJ.argsort(dim=1, stable=True).int().contiguous(),
        sight.whole_IJ.sum(1, dtype=torch.int32),
        sight.needed_IJ.sum(1, dtype=torch.int32),
    )


def transposed(sight: Sight) -> Sight:
    """What tiles of keys are seen by tiles of queries."""
    return Sight(sight.needed_IJ.T, sight.whole_IJ.T)


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring keys start..stop that a query tile sees, all of them or `masked` ones."""

    start: int
    stop: int
    masked: bool


@dataclass(frozen=True, slots=True)
class QueryTile:
    """Queries start..stop and the keys that at least one of them sees."""

    start: int
    stop: int
    spans: tuple[Span, ...]


def plan_tiles(layout_KQ: Tensor, keys: int, tile: int) -> list[QueryTile]:
    """The spans of keys that each tile of queries needs, on the host.

    Args:
        layout_KQ: int32 layout of the queries.
        keys: L.
        tile: M = N.
    """
    sight = tile_sight(layout_KQ, keys, tile, tile)
    plan = []
    for i, (needed_J, whole_J) in enumerate(
        zip(sight.needed_IJ.tolist(), sight.whole_IJ.tolist(), strict=True)
    ):
        spans: list[Span] = []
        for j in (j for j, needed in enumerate(needed_J) if needed):
            start, stop, masked = j * tile, min((j + 1) * tile, keys), not whole_J[j]
            if spans and spans[-1].stop == start and spans[-1].masked == masked:
                start = spans.pop().start
            spans.append(Span(start, stop, masked))
        plan.append(QueryTile(i * tile, min((i + 1) * tile, layout_KQ.shape[1]), tuple(spans)))
    return plan


def visible(layout_KM: Tensor, start: int, stop: int) -> Tensor:
    """The mask [M, stop - start] of a tile: whether each query sees each key, as the layout defines it."""
    key_S = torch.arange(start, stop, device=layout_KM.device)
    columns_KM1 = layout_KM.unsqueeze(-1)
    seen_MS = (columns_KM1[1] <= key_S) & (key_S <= columns_KM1[0])
    for lo_M1, hi_M1 in zip(columns_KM1[2::2], columns_KM1[3::2], strict=True):
        seen_MS &= (key_S < lo_M1) | (hi_M1 <= key_S)
    return seen_MS
