"""Attention by the Triton kernels, differentiable once.

Shapes: Q queries, L keys, H query heads in G groups that share a key/value head, D head dimension, K rows of
the layout, P splits of a group's heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from megatron_parallel_r1.model.attention.dispatch import is_interpreted
from megatron_parallel_r1.model.attention.tiles import (
    LayoutCache,
    TileLists,
    tile_lists,
    tile_visibility,
    transposed,
)
from megatron_parallel_r1.model.attention.triton_kernels import (
    delta_kernel,
    forward_kernel,
    key_gradient_kernel,
    query_gradient_kernel,
)
from megatron_parallel_r1.model.attention.triton_tilings import HOPPER_SHARED_BYTES, Tiling, Tilings, tilings

LISTS = LayoutCache()
# Programs that fill a large GPU: about two for each of an H200's 132 multiprocessors.
MIN_PROGRAMS = 264
# Queries of a program of delta_kernel.
DELTA_ROWS = 32


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Sizes that every launch needs."""

    queries: int
    keys: int
    heads: int
    groups: int
    dim: int
    levels: int

    @classmethod
    def of(cls, query_QHD: Tensor, key_LGD: Tensor, layout_KQ: Tensor) -> _Sizes:
        (queries, heads, dim), (keys, groups, _) = query_QHD.shape, key_LGD.shape
        return cls(queries, keys, heads, groups, dim, len(layout_KQ) // 2 - 1)

    @property
    def block_d(self) -> int:
        return _width(self.dim)


def _width(dim: int) -> int:
    """Returns D rounded up to a power of two, at least the 16 of tensor cores."""
    return max(16, triton.next_power_of_2(dim))


def _lists(layout_KQ: Tensor, keys: int, tiling: Tiling, by_key: bool) -> TileLists:
    def compute() -> TileLists:
        visibility = tile_visibility(layout_KQ, keys, tiling.queries, tiling.keys)
        return tile_lists(transposed(visibility) if by_key else visibility)

    return LISTS.get(layout_KQ, (keys, tiling.queries, tiling.keys, by_key), compute)


def _rows(tensor: Tensor) -> tuple[int, int]:
    return tensor.stride(0), tensor.stride(1)


def _forward(
    query_QHD: Tensor, key_LGD: Tensor, value_LGD: Tensor, layout_KQ: Tensor, scale: float, tiling: Tiling
) -> tuple[Tensor, Tensor]:
    sizes = _Sizes.of(query_QHD, key_LGD, layout_KQ)
    lists = _lists(layout_KQ, sizes.keys, tiling, by_key=False)
    out_QHD = torch.empty(query_QHD.shape, dtype=query_QHD.dtype, device=query_QHD.device)
    lse2_HQ = torch.empty(sizes.heads, sizes.queries, device=query_QHD.device)
    forward_kernel[len(lists.whole_I), sizes.heads](
        query_QHD, key_LGD, value_LGD, layout_KQ, lists.tiles_IJ, lists.whole_I, lists.needed_I,
        out_QHD, lse2_HQ, scale * math.log2(math.e), sizes.queries, sizes.keys, lists.tiles_IJ.stride(0),
        *_rows(query_QHD), *_rows(key_LGD), *_rows(value_LGD), *_rows(out_QHD), sizes.dim,
        SHARED=sizes.heads // sizes.groups, LEVELS=sizes.levels,
        BLOCK_M=tiling.queries, BLOCK_N=tiling.keys, BLOCK_D=sizes.block_d,
        EMULATED=is_interpreted(), num_warps=tiling.warps, num_stages=tiling.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return out_QHD, lse2_HQ


def _delta(out_QHD: Tensor, grad_QHD: Tensor) -> Tensor:
    queries, heads, dim = out_QHD.shape
    delta_HQ = torch.empty(heads, queries, device=out_QHD.device)
    delta_kernel[triton.cdiv(queries, DELTA_ROWS), heads](
        out_QHD, grad_QHD, delta_HQ, queries, *_rows(out_QHD), *_rows(grad_QHD), dim,
        BLOCK_M=DELTA_ROWS, BLOCK_D=_width(dim),
    )  # fmt: skip
    return delta_HQ


def _query_gradient(
    query_QHD: Tensor, key_LGD: Tensor, value_LGD: Tensor, grad_QHD: Tensor, layout_KQ: Tensor,
    lse2_HQ: Tensor, delta_HQ: Tensor, scale: float, tiling: Tiling,
) -> Tensor:  # fmt: skip
    sizes = _Sizes.of(query_QHD, key_LGD, layout_KQ)
    lists = _lists(layout_KQ, sizes.keys, tiling, by_key=False)
    query_grad_QHD = torch.empty(query_QHD.shape, dtype=query_QHD.dtype, device=query_QHD.device)
    query_gradient_kernel[len(lists.whole_I), sizes.heads](
        query_QHD, key_LGD, value_LGD, grad_QHD, layout_KQ, lists.tiles_IJ, lists.whole_I, lists.needed_I,
        lse2_HQ, delta_HQ, query_grad_QHD, scale, scale * math.log2(math.e), sizes.queries, sizes.keys,
        lists.tiles_IJ.stride(0), *_rows(query_QHD), *_rows(key_LGD), *_rows(value_LGD), *_rows(grad_QHD),
        *_rows(query_grad_QHD), sizes.dim, SHARED=sizes.heads // sizes.groups, LEVELS=sizes.levels,
        BLOCK_M=tiling.queries, BLOCK_N=tiling.keys, BLOCK_D=sizes.block_d,
        EMULATED=is_interpreted(), num_warps=tiling.warps, num_stages=tiling.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return query_grad_QHD


def _key_gradient(
    query_QHD: Tensor, key_LGD: Tensor, value_LGD: Tensor, grad_QHD: Tensor, layout_KQ: Tensor,
    lse2_HQ: Tensor, delta_HQ: Tensor, scale: float, tiling: Tiling,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    sizes = _Sizes.of(query_QHD, key_LGD, layout_KQ)
    lists = _lists(layout_KQ, sizes.keys, tiling, by_key=True)
    shared, programs = sizes.heads // sizes.groups, len(lists.whole_I) * sizes.groups
    # A short row with few groups: split each group's heads, and sum them afterwards in float32.
    splits = shared if programs < MIN_PROGRAMS else 1
    dtype = torch.float32 if splits > 1 else key_LGD.dtype
    grads_PLGD = [torch.empty(splits, *key_LGD.shape, dtype=dtype, device=key_LGD.device) for _ in range(2)]
    key_gradient_kernel[len(lists.whole_I), sizes.groups, splits](
        query_QHD, key_LGD, value_LGD, grad_QHD, layout_KQ, lists.tiles_IJ, lists.whole_I, lists.needed_I,
        lse2_HQ, delta_HQ, *grads_PLGD, scale, scale * math.log2(math.e), sizes.queries, sizes.keys,
        lists.tiles_IJ.stride(0), *_rows(query_QHD), *_rows(key_LGD), *_rows(value_LGD), *_rows(grad_QHD),
        *grads_PLGD[0].stride()[:3], sizes.dim, HEADS=shared // splits, LEVELS=sizes.levels,
        BLOCK_M=tiling.queries, BLOCK_N=tiling.keys, BLOCK_D=sizes.block_d,
        EMULATED=is_interpreted(), num_warps=tiling.warps, num_stages=tiling.stages, enable_fp_fusion=True,
    )  # fmt: skip
    key_grad_LGD, value_grad_LGD = (x.sum(0).to(key_LGD) if splits > 1 else x[0] for x in grads_PLGD)
    return key_grad_LGD, value_grad_LGD


class _KernelAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_QHD: Tensor,
        key_LGD: Tensor,
        value_LGD: Tensor,
        layout_KQ: Tensor,
        scale: float,
        chosen: Tilings,
    ) -> tuple[Tensor, Tensor]:
        out_QHD, lse2_HQ = _forward(query_QHD, key_LGD, value_LGD, layout_KQ, scale, chosen.forward)
        ctx.save_for_backward(query_QHD, key_LGD, value_LGD, layout_KQ, out_QHD, lse2_HQ)
        ctx.scale, ctx.chosen = scale, chosen
        ctx.mark_non_differentiable(lse2_HQ)
        return out_QHD, lse2_HQ

    @staticmethod
    def backward(ctx: Any, grad_QHD: Tensor, _lse_grad: Tensor) -> tuple[Tensor | None, ...]:
        query_QHD, key_LGD, value_LGD, layout_KQ, out_QHD, lse2_HQ = ctx.saved_tensors
        grad_QHD = _dense_heads(grad_QHD)
        delta_HQ = _delta(out_QHD, grad_QHD)
        inputs = (query_QHD, key_LGD, value_LGD, grad_QHD, layout_KQ, lse2_HQ, delta_HQ, ctx.scale)
        query_grad_QHD = _query_gradient(*inputs, ctx.chosen.query_gradient)
        return query_grad_QHD, *_key_gradient(*inputs, ctx.chosen.key_gradient), None, None, None


@cache
def _shared_bytes(device: torch.device) -> int:
    """Shared memory that a program may use; the interpreter has no limit."""
    if device.type != "cuda":
        return HOPPER_SHARED_BYTES
    return driver.active.utils.get_device_properties(device.index)["max_shared_mem"]


def _dense_heads(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


def kernel_attention(
    query_QHD: Tensor,
    key_LGD: Tensor,
    value_LGD: Tensor,
    layout_KQ: Tensor,
    scale: float,
    chosen: Tilings | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one packed row under its layout; arguments as in `dispatch.path_attention`.

    Args:
        query_QHD, key_LGD, value_LGD: not float64; all sums are in float32. D is at most 256.
        scale: positive.
        chosen: tile sizes; None: those of triton_tilings.py.

    Returns:
        [Q, H, D] in the dtype of the query, and each query's log-sum-exp, float32 [H, Q], without gradient.
    """
    chosen = chosen or tilings(query_QHD.shape[2], query_QHD.dtype, _shared_bytes(query_QHD.device))
    parts = (_dense_heads(x) for x in (query_QHD, key_LGD, value_LGD))
    out_QHD, lse2_HQ = _KernelAttention.apply(*parts, layout_KQ.contiguous(), scale, chosen)
    return out_QHD, lse2_HQ * math.log(2)
