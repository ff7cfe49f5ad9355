"""Attention under a layout by torch's FlexAttention (arXiv 2412.05496), with a block mask from the layout.

`create_block_mask` would evaluate all Q x L pairs; here the bounds of the tiles give the visible blocks
(tiles.py), and the layout is evaluated only inside partially visible ones.

Shapes: Q queries, L keys, H query heads in G groups that share a key/value head, D head dimension, K rows of
the layout, I query blocks, J key blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import BlockMask

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.model.attention.tiles import (
    LayoutCache,
    TileVisibility,
    tile_lists,
    tile_visibility,
)

BLOCK = 128  # a multiple of FlexAttention's own tiles
# Each depth of hidden intervals, dtype and need of gradients has its own graph, more than the default limit
# of 8, past which torch would run uncompiled, over all pairs of the row.
MAX_GRAPHS = 64
MASKS = LayoutCache()


def block_mask(layout_KQ: Tensor, keys: int) -> BlockMask:
    """Converts the queries' layout to FlexAttention's block mask over L `keys`."""
    # A copy: a view would keep the layout, and so the cache entry, alive for ever.
    index_Q, start_Q, *hidden_Q = layout_KQ.clone()

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (start_Q[query] <= key) & (key <= index_Q[query])
        for lo_Q, hi_Q in zip(hidden_Q[::2], hidden_Q[1::2], strict=True):
            seen = seen & ((key < lo_Q[query]) | (hi_Q[query] <= key))
        return seen

    visibility = tile_visibility(layout_KQ, keys, BLOCK, BLOCK)
    # FlexAttention takes whole blocks and partial ones separately.
    partial = tile_lists(
        TileVisibility(visibility.needed_IJ & ~visibility.whole_IJ, torch.zeros_like(visibility.whole_IJ))
    )
    whole = tile_lists(TileVisibility(visibility.whole_IJ, torch.zeros_like(visibility.whole_IJ)))
    return BlockMask.from_kv_blocks(
        partial.needed_I[None, None],
        partial.tiles_IJ[None, None],
        whole.needed_I[None, None],
        whole.tiles_IJ[None, None],
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(layout_KQ.shape[1], keys),
    )


@cache
def _compiled() -> Callable[..., Tensor]:
    # fullgraph: an error instead of an L x L mask.
    return torch.compile(flex.flex_attention, fullgraph=True)


def flex_attention(
    query_QHD: Tensor,
    key_LGD: Tensor,
    value_LGD: Tensor,
    layout_KQ: Tensor,
    scale: float,
    compiled: bool = True,
) -> Tensor:
    """Attention of one packed row under its layout; arguments and result as in `dispatch.path_attention`.

    Args:
        compiled: False evaluates every pair of the row, for tests.

    Raises:
        UserError: a gradient is needed on a CPU, where FlexAttention has no backward.
    """
    parts = (query_QHD, key_LGD, value_LGD)
    if torch.is_grad_enabled() and not query_QHD.is_cuda and any(part.requires_grad for part in parts):
        raise UserError("model.attention: flex has no backward on a CPU; set it to auto, or tiled")
    mask = MASKS.get(layout_KQ, len(key_LGD), lambda: block_mask(layout_KQ, len(key_LGD)))
    attend: Callable[..., Tensor] = _compiled() if compiled else cast(Any, flex.flex_attention)
    query_1HQD, key_1GLD, value_1GLD = (part.transpose(0, 1)[None] for part in parts)
    with torch._dynamo.config.patch(recompile_limit=MAX_GRAPHS):
        out_1HQD = attend(query_1HQD, key_1GLD, value_1GLD, block_mask=mask, scale=scale, enable_gqa=True)
    return out_1HQD[0].transpose(0, 1)
