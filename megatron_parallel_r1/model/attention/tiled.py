"""Attention under a layout in plain torch and O(L) memory; tiles that no query sees are skipped.

Queries are processed C at a time against the keys that at least one of them sees (tiles.py); a mask is built
only for partially visible tiles. Backward recomputes a tile's weights, as in FlashAttention (arXiv
2205.14135), so no mask and no score outlives its tile.

Shapes: Q queries of this rank, L keys of the row (more than Q under context parallelism), H query heads in
G groups that share a key/value head (H = G * R), D head dimension, C tile size, N = R * C rows of a query
tile, S keys that a query tile sees, K rows of the layout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_parallel_r1.model.attention.tiles import KeySpan, QueryTile, plan_tiles, visible

TILE = 64


def _gather(values_GLD: Tensor, spans: tuple[KeySpan, ...], dtype: torch.dtype) -> Tensor:
    parts = [values_GLD[:, span.start : span.stop] for span in spans]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).to(dtype)


def _scatter_add(total_GDL: Tensor, left_GDN: Tensor, right_GNS: Tensor, spans: tuple[KeySpan, ...]) -> None:
    offset = 0
    for span in spans:
        width = span.stop - span.start
        total_GDL[:, :, span.start : span.stop].baddbmm_(left_GDN, right_GNS[:, :, offset : offset + width])
        offset += width


def _softmax(query_GND: Tensor, key_GSD: Tensor, layout_KQ: Tensor, tile: QueryTile) -> Tensor:
    scores_GNS = query_GND @ key_GSD.transpose(1, 2)
    scores_GRCS = scores_GNS.unflatten(1, (-1, tile.stop - tile.start))
    offset = 0
    for span in tile.spans:
        width = span.stop - span.start
        if span.masked:
            seen_CS = visible(layout_KQ[:, tile.start : tile.stop], span.start, span.stop)
            scores_GRCS[..., offset : offset + width].masked_fill_(~seen_CS, -torch.inf)
        offset += width
    return scores_GNS.softmax(-1)


class _TiledAttention(torch.autograd.Function):
    """softmax(scale * query key^T under the layout) value, with grouped query heads."""

    @staticmethod
    def forward(
        ctx: Any,
        query_GRQD: Tensor,
        key_GLD: Tensor,
        value_GLD: Tensor,
        layout_KQ: Tensor,
        scale: float,
        tile: int,
    ) -> Tensor:
        wide = torch.promote_types(query_GRQD.dtype, torch.float32)
        plan = plan_tiles(layout_KQ, key_GLD.shape[1], tile)
        out_GRQD = torch.empty_like(query_GRQD)
        for part in plan:
            query_GRCD = query_GRQD[:, :, part.start : part.stop]
            query_GND = query_GRCD.flatten(1, 2).to(wide) * scale
            weights_GNS = _softmax(query_GND, _gather(key_GLD, part.spans, wide), layout_KQ, part)
            out_GND = weights_GNS @ _gather(value_GLD, part.spans, wide)
            out_GRQD[:, :, part.start : part.stop] = out_GND.view_as(query_GRCD)
        ctx.save_for_backward(query_GRQD, key_GLD, value_GLD, layout_KQ)
        ctx.scale, ctx.plan = scale, plan
        return out_GRQD

    @staticmethod
    def backward(ctx: Any, grad_GRQD: Tensor) -> tuple[Tensor | None, ...]:
        query_GRQD, key_GLD, value_GLD, layout_KQ = ctx.saved_tensors
        wide = torch.promote_types(query_GRQD.dtype, torch.float32)
        query_grad_GRQD = torch.empty_like(query_GRQD)
        key_grad_GDL = torch.zeros_like(key_GLD.transpose(1, 2), dtype=wide)
        value_grad_GDL = torch.zeros_like(key_grad_GDL)
        for part in ctx.plan:
            query_GRCD = query_GRQD[:, :, part.start : part.stop]
            query_GND = query_GRCD.flatten(1, 2).to(wide) * ctx.scale
            key_GSD = _gather(key_GLD, part.spans, wide)
            weights_GNS = _softmax(query_GND, key_GSD, layout_KQ, part)
            grad_GND = grad_GRQD[:, :, part.start : part.stop].flatten(1, 2).to(wide)
            _scatter_add(value_grad_GDL, grad_GND.transpose(1, 2), weights_GNS, part.spans)
            weights_grad_GNS = grad_GND @ _gather(value_GLD, part.spans, wide).transpose(1, 2)
            scores_grad_GNS = torch._softmax_backward_data(weights_grad_GNS, weights_GNS, -1, wide)
            _scatter_add(key_grad_GDL, query_GND.transpose(1, 2), scores_grad_GNS, part.spans)
            query_grad_GND = (scores_grad_GNS @ key_GSD).mul_(ctx.scale)
            query_grad_GRQD[:, :, part.start : part.stop] = query_grad_GND.view_as(query_GRCD)
        key_grad_GLD, value_grad_GLD = key_grad_GDL.transpose(1, 2), value_grad_GDL.transpose(1, 2)
        return query_grad_GRQD, key_grad_GLD.to(key_GLD), value_grad_GLD.to(value_GLD), None, None, None


def tiled_attention(
    query_QHD: Tensor, key_LGD: Tensor, value_LGD: Tensor, layout_KQ: Tensor, scale: float, tile: int = TILE
) -> Tensor:
    """Attention of one packed row under its layout; arguments and result as in `dispatch.path_attention`."""
    queries, heads, dim = query_QHD.shape
    groups = key_LGD.shape[1]
    query_GRQD = query_QHD.transpose(0, 1).reshape(groups, heads // groups, queries, dim)
    key_GLD, value_GLD = (x_LGD.transpose(0, 1).contiguous() for x_LGD in (key_LGD, value_LGD))
    out_GRQD = _TiledAttention.apply(query_GRQD, key_GLD, value_GLD, layout_KQ, scale, tile)
    return out_GRQD.flatten(0, 1).transpose(0, 1)
