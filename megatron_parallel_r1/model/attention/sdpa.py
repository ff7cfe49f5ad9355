"""Attention under a layout by torch's fused CPU kernel, which supports causal order and masks.

A plan splits the row into kernel calls. Consecutive queries with the same document start and hidden intervals
form a segment: all of them see the same keys before it, and each other causally. So a long segment takes two
calls without a mask; short ones share a call, with a mask over the keys that at least one of them sees.

Two results for the same queries are merged by their log-sum-exps; with those of the merged softmax, each
call's backward is exact without change, as for the blocks of FlashAttention (arXiv 2205.14135).

Shapes: Q queries of this rank, L keys of the row (more than Q under context parallelism), H query heads in
G groups that share a key/value head, D head dimension, M queries of a call, S keys of a call, K rows of the
layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_parallel_r1.model.attention.tiles import LayoutCache, visible

# Queries from which a segment has its own calls, and the most that share one: lower values pay more per call,
# higher ones compute more masked pairs.
LONG = 64

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class KernelCall:
    """Queries start..stop against the keys of `spans`, ascending and disjoint.

    Attributes:
        mask: every query sees every key; the n-th sees the first n + 1; or the layout decides.
    """

    start: int
    stop: int
    spans: tuple[Range, ...]
    mask: Literal["whole", "causal", "layout"]


def plan_calls(layout_KQ: Tensor, long: int = LONG) -> list[tuple[KernelCall, ...]]:
    """Plans the calls, on the host; the calls of the same queries form one tuple."""
    plan: list[tuple[KernelCall, ...]] = []
    waiting: list[_Segment] = []
    for segment in _segments(layout_KQ.cpu().numpy()):
        if segment.is_plain and len(segment) >= long:
            plan += _shared(waiting)
            waiting = []
            plan.append(segment.calls())
            continue
        for piece in segment.split(long):
            if waiting and piece.stop - waiting[0].start > long:
                plan += _shared(waiting)
                waiting = []
            waiting.append(piece)
    return plan + _shared(waiting)


@dataclass(frozen=True, slots=True)
class _Segment:
    """Queries start..stop, the first of which is token `index` of the row, and what is hidden from them."""

    start: int
    stop: int
    index: int
    document: int
    hidden: tuple[Range, ...]

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def is_plain(self) -> bool:
        """Whether the queries see each other causally, and the same keys before the segment."""
        return all(hi <= self.index for _, hi in self.hidden)

    def split(self, size: int) -> Iterator[_Segment]:
        for start in range(self.start, self.stop, size):
            stop = min(start + size, self.stop)
            yield _Segment(start, stop, self.index + start - self.start, self.document, self.hidden)

    def before(self, end: int) -> list[Range]:
        """Returns the tokens before `end` that the queries see, as ascending ranges."""
        seen, at = [], self.document
        for lo, hi in sorted(self.hidden):
            if at < min(lo, end):
                seen.append((at, min(lo, end)))
            at = max(at, hi)
        return [*seen, (at, end)] if at < end else seen

    def calls(self) -> tuple[KernelCall, ...]:
        own = KernelCall(self.start, self.stop, ((self.index, self.index + len(self)),), "causal")
        before = self.before(self.index)
        return (KernelCall(self.start, self.stop, tuple(before), "whole"), own) if before else (own,)


def _segments(layout_KQ: NDArray[np.int32]) -> Iterator[_Segment]:
    index_Q, *others_Q = layout_KQ
    changes = np.diff(index_Q) != 1
    for other_Q in others_Q:
        changes |= np.diff(other_Q) != 0
    bounds = [0, *(np.flatnonzero(changes) + 1).tolist(), len(index_Q)]
    for start, stop in pairwise(bounds):
        index, document, *hidden = layout_KQ[:, start].tolist()
        pairs = zip(hidden[::2], hidden[1::2], strict=True)
        yield _Segment(start, stop, index, document, tuple((lo, hi) for lo, hi in pairs if lo < hi))


def _shared(segments: Sequence[_Segment]) -> list[tuple[KernelCall, ...]]:
    """Returns the shared call of short segments; nothing for no segment."""
    if not segments:
        return []
    ranges = sorted(seen for segment in segments for seen in segment.before(segment.index + len(segment)))
    spans = [ranges[0]]
    for lo, hi in ranges[1:]:
        if lo <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(spans[-1][1], hi))
        else:
            spans.append((lo, hi))
    return [(KernelCall(segments[0].start, segments[-1].stop, tuple(spans), "layout"),)]


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
    """Attention of one packed row under its layout; arguments and result as in `dispatch.path_attention`."""
    dtype = query_QHD.dtype
    wide = torch.promote_types(dtype, torch.float32)
    parts = (part.to(wide) for part in (query_QHD, key_LGD, value_LGD))
    plan = PLANS.get(layout_KQ, long, lambda: plan_calls(layout_KQ, long))
    return _SdpaAttention.apply(*parts, layout_KQ, scale, plan).to(dtype)
