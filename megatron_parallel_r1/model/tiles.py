"""Which tiles of keys a tile of queries needs under a layout, by interval arithmetic.

A layout says for each query where its document starts and which key intervals it must not see
(thought/layout.py). Queries and keys are cut into tiles of C. For each pair of tiles the bounds of the
layout tell whether all of the queries see all of the keys, some see some, or none sees any.

Shapes: Q queries of this process, L keys of the row (more than Q under context parallelism), C tile size,
S keys of a span, K rows of the layout, d hidden intervals, I query tiles, J key tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
    """Which tiles of keys each tile of queries needs, from the layout alone and never a [Q, L] mask.

    A tile is skipped if it lies outside [start of document, query] for all queries, or within one interval
    that all of them hide. The bounds are taken over a whole query tile, so a key tile that nobody sees may
    at times be computed and masked; one that somebody sees is never skipped.

    Args:
        layout_KQ: int32 layout of the queries.
        keys: L.
        tile: C.
    """
    index_Q, start_Q, lo_dQ, hi_dQ = layout_KQ[0], layout_KQ[1], layout_KQ[2::2], layout_KQ[3::2]
    queries = layout_KQ.shape[1]
    key_lo_J = torch.arange(0, keys, tile, device=layout_KQ.device)
    key_hi_J = (key_lo_J + tile).clamp(max=keys)

    def least(values_Q: Tensor) -> Tensor:
        return torch.stack([part.amin(-1) for part in values_Q.split(tile, -1)], -1).unsqueeze(-1)

    def most(values_Q: Tensor) -> Tensor:
        return -least(-values_Q)

    # What some query may see of a key tile, and what all of them hide.
    some_lo_IJ = torch.maximum(key_lo_J, least(start_Q))
    some_hi_IJ = torch.minimum(key_hi_J, most(index_Q) + 1)
    hidden_IJ = ((most(lo_dQ) <= some_lo_IJ) & (some_hi_IJ <= least(hi_dQ))).any(0)
    needed_IJ = (some_lo_IJ < some_hi_IJ) & ~hidden_IJ
    # What all queries see: no document start, no future and no hidden interval in the tile.
    unused_dQ = lo_dQ >= hi_dQ
    hull_lo_dI1 = least(lo_dQ.masked_fill(unused_dQ, keys))
    hull_hi_dI1 = most(hi_dQ.masked_fill(unused_dQ, 0))
    clear_IJ = ((key_hi_J <= hull_lo_dI1) | (hull_hi_dI1 <= key_lo_J)).all(0)
    whole_IJ = (most(start_Q) <= key_lo_J) & (key_hi_J <= least(index_Q) + 1) & clear_IJ

    plan = []
    for i, (needed_J, whole_J) in enumerate(zip(needed_IJ.tolist(), whole_IJ.tolist(), strict=True)):
        spans: list[Span] = []
        for j in (j for j, needed in enumerate(needed_J) if needed):
            start, stop, masked = j * tile, min((j + 1) * tile, keys), not whole_J[j]
            if spans and spans[-1].stop == start and spans[-1].masked == masked:
                start = spans.pop().start
            spans.append(Span(start, stop, masked))
        plan.append(QueryTile(i * tile, min((i + 1) * tile, queries), tuple(spans)))
    return plan


def visible(layout_KC: Tensor, start: int, stop: int) -> Tensor:
    """The mask [C, stop - start] of a tile: whether each query sees each key, as the layout defines it."""
    key_S = torch.arange(start, stop, device=layout_KC.device)
    columns_KC1 = layout_KC.unsqueeze(-1)
    seen_CS = (columns_KC1[1] <= key_S) & (key_S <= columns_KC1[0])
    for lo_C1, hi_C1 in zip(columns_KC1[2::2], columns_KC1[3::2], strict=True):
        seen_CS &= (key_S < lo_C1) | (hi_C1 <= key_S)
    return seen_CS
