"""Attention under a layout by torch's fused CPU kernel, which supports causal order and masks.

A plan (segments.py) splits the row into kernel calls. The results of two calls for the same queries are
merged by their log-sum-exps; with those of the merged softmax, each call's backward is exact without change,
as for the blocks of FlashAttention (arXiv 2205.14135).

Shapes: Q queries of this rank, L keys of the row (more than Q under context parallelism), H query heads in
G groups that share a key/value head, D head dimension, M queries of a call, S keys of a call, K rows of the
layout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_parallel_r1.model.attention.layout_cache import LayoutCache
from megatron_parallel_r1.model.attention.segments import LONG, KernelCall, plan_calls
from megatron_parallel_r1.model.attention.tiles import visible

PLANS = LayoutCache()
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _batch(x_MHD: Tensor) -> Tensor:
    return x_MHD.transpose(0, 1).unsqueeze(0)


def _gather(x_LGD: Tensor, call: KernelCall) -> Tensor:
    parts = [x_LGD[lo:hi] for lo, hi in call.spans]
    return _batch(parts[0] if len(parts) == 1 else torch.cat(parts))


def _scatter_add(total_LGD: Tensor, x_1GSD: Tensor, call: KernelCall) -> None:
    x_SGD, offset = x_1GSD[0].transpose(0, 1), 0
    for lo, hi in call.spans:
        total_LGD[lo:hi] += x_SGD[offset : offset + hi - lo]
        offset += hi - lo


def _bias(layout_KQ: Tensor, call: KernelCall, dtype: torch.dtype) -> Tensor | None:
    """Returns the mask as a bias [M, S], or None where the kernel needs none."""
    if call.mask != "layout":
        return None
    layout_KM = layout_KQ[:, call.start : call.stop]
    sees_MS = torch.cat([visible(layout_KM, lo, hi) for lo, hi in call.spans], 1)
    return torch.zeros(sees_MS.shape, dtype=dtype).masked_fill_(~sees_MS, -torch.inf)


class _SdpaAttention(torch.autograd.Function):
    """softmax(scale * query key^T under the layout) value, in float32 or float64."""

    @staticmethod
    def forward(
        ctx: Any,
        query_QHD: Tensor,
        key_LGD: Tensor,
        value_LGD: Tensor,
        layout_KQ: Tensor,
        scale: float,
        plan: list[tuple[KernelCall, ...]],
    ) -> Tensor:
        out_QHD, logsum_QH = torch.empty_like(query_QHD), query_QHD.new_empty(query_QHD.shape[:2])
        for calls in plan:
            here = slice(calls[0].start, calls[0].stop)
            results = []
            for call in calls:
                parts = (_batch(query_QHD[here]), _gather(key_LGD, call), _gather(value_LGD, call))
                bias_MS = _bias(layout_KQ, call, query_QHD.dtype)
                out_1HMD, logsum_1HM = _forward(
                    *parts, 0.0, call.mask == "causal", attn_mask=bias_MS, scale=scale
                )
                results.append((out_1HMD[0].transpose(0, 1), logsum_1HM[0].T))
            (merged_MHD, logsum_MH), *others = results
            for other_MHD, other_MH in others:
                # The other call's share of the two sums.
                share_MH = torch.sigmoid(other_MH - logsum_MH)
                merged_MHD = torch.lerp(merged_MHD, other_MHD, share_MH.unsqueeze(-1))
                logsum_MH = torch.logaddexp(logsum_MH, other_MH)
            out_QHD[here], logsum_QH[here] = merged_MHD, logsum_MH
        ctx.save_for_backward(query_QHD, key_LGD, value_LGD, layout_KQ, out_QHD, logsum_QH)
        ctx.scale, ctx.plan = scale, plan
        return out_QHD

    @staticmethod
    def backward(ctx: Any, grad_QHD: Tensor) -> tuple[Tensor | None, ...]:
        query_QHD, key_LGD, value_LGD, layout_KQ, out_QHD, logsum_QH = ctx.saved_tensors
        query_grad_QHD = torch.zeros_like(query_QHD)
        key_grad_LGD, value_grad_LGD = torch.zeros_like(key_LGD), torch.zeros_like(value_LGD)
        for calls in ctx.plan:
            here = slice(calls[0].start, calls[0].stop)
            grad_1HMD, query_1HMD, out_1HMD = (_batch(x[here]) for x in (grad_QHD, query_QHD, out_QHD))
            logsum_1HM = logsum_QH[here].T.unsqueeze(0)
            for call in calls:
                query_grad_1HMD, key_grad_1GSD, value_grad_1GSD = _backward(
                    grad_1HMD,
                    query_1HMD,
                    _gather(key_LGD, call),
                    _gather(value_LGD, call),
                    out_1HMD,
                    logsum_1HM,
                    0.0,
                    call.mask == "causal",
                    attn_mask=_bias(layout_KQ, call, query_QHD.dtype),
                    scale=ctx.scale,
                )
                query_grad_QHD[here] += query_grad_1HMD[0].transpose(0, 1)
                _scatter_add(key_grad_LGD, key_grad_1GSD, call)
                _scatter_add(value_grad_LGD, value_grad_1GSD, call)
        return query_grad_QHD, key_grad_LGD, value_grad_LGD, None, None, None


def sdpa_attention(
    query_QHD: Tensor, key_LGD: Tensor, value_LGD: Tensor, layout_KQ: Tensor, scale: float, long: int = LONG
) -> Tensor:
    """Attention of one packed row under its layout; arguments and result as in `dispatch.path_attention`.

    Args:
        long: as for `plan_calls`.
    """
    dtype = query_QHD.dtype
    wide = torch.promote_types(dtype, torch.float32)
    parts = (part.to(wide) for part in (query_QHD, key_LGD, value_LGD))
    plan = PLANS.get(layout_KQ, long, lambda: plan_calls(layout_KQ, long))
    return _SdpaAttention.apply(*parts, layout_KQ, scale, plan).to(dtype)
