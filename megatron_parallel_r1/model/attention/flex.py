"""Attention under a layout by torch's FlexAttention (arXiv 2412.05496), its block mask made of the layout.

`create_block_mask` would look at each of Q x L pairs; here the bounds of the tiles say which blocks are seen
(tiles.py), and only inside those that some see and some do not, the layout itself is asked.

Shapes: Q queries, L keys, H query heads in G groups that share a key/value head, D head dimension, K rows of
the layout, I query blocks, J key blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import BlockMask

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.model.attention.layout_cache import LayoutMemo
from megatron_parallel_r1.model.attention.tiles import Sight, tile_lists, tile_sight

BLOCK = 128  # What FlexAttention's own tiles divide.
# A depth of hidden intervals, a dtype and whether gradients are wanted each take a graph of their own, more
# than the 8 that torch makes at most before it goes on without compiling, over all pairs of the row.
MOST_GRAPHS = 64
MASKS = LayoutMemo()


def block_mask(layout_KQ: Tensor, keys: int) -> BlockMask:
    """FlexAttention's form of a layout.

    Args:
        layout_KQ: int32 layout of the queries.
        keys: L.
    """
    # A copy: a view of the layout would keep it, and with it the memo's entry, for ever.
    index_Q, start_Q, *hidden_Q = layout_KQ.clone()

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (start_Q[query] <= key) & (key <= index_Q[query])
        for lo_Q, hi_Q in zip(hidden_Q[::2], hidden_Q[1::2], strict=True):
            seen = seen & ((key < lo_Q[query]) | (hi_Q[query] <= key))
        return seen

    sight = tile_sight(layout_KQ, keys, BLOCK, BLOCK)
    # FlexAttention wants those blocks apart that are whole and those that are not.
    partial = tile_lists(Sight(sight.needed_IJ & ~sight.whole_IJ, torch.zeros_like(sight.whole_IJ)))
    whole = tile_lists(Sight(sight.whole_IJ, torch.zeros_like(sight.whole_IJ)))
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
    # Rather an error than a mask of L x L.
    return torch.compile(flex.flex_attention, fullgraph=True)


def flex_attention(
    query_QHD: Tensor,
    key_LGD: Tensor,
    value_LGD: Tensor,
    layout_KQ: Tensor,
    scale: float,
    compiled: bool = True,
) -> Tensor:
    """Attention of one packed row under its layout; arguments and result as `choice.path_attention`'s.

    Args:
        compiled: False computes every pair of the row, for tests.

    Raises:
        UserError: a gradient is wanted on a CPU, where FlexAttention has none.
    """
    parts = (query_QHD, key_LGD, value_LGD)
    if torch.is_grad_enabled() and not query_QHD.is_cuda and any(part.requires_grad for part in parts):
        raise UserError("model.attention: flex has no backward on a CPU; set it to auto, or tiled")
    mask = MASKS.of(layout_KQ, len(key_LGD), lambda: block_mask(layout_KQ, len(key_LGD)))
    attend = _compiled() if compiled else flex.flex_attention
    query_1HQD, key_1GLD, value_1GLD = (part.transpose(0, 1)[None] for part in parts)
    with torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS):
        out_1HQD = attend(query_1HQD, key_1GLD, value_1GLD, block_mask=mask, scale=scale, enable_gqa=True)
    return out_1HQD[0].transpose(0, 1)
