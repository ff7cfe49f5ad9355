"""Attention under a layout: right by its definition, and how fast beside what else there is.

Shapes: L tokens, H query heads, G key/value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.clock import Cost, cost_of
from benchmarks.gpu.rows import dense_mask, timed_rows, visible_pairs
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.tables import Table
from megatron_parallel_r1.model.attention.choice import Kernel, path_attention
from tests.unit.model.kernels.dense import dense_attended

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def kernels_on(device: torch.device) -> tuple[Kernel, ...]:
    """Those that train there; the first is the one that `auto` takes."""
    return ("triton", "flex", "tiled") if device.type == "cuda" else ("tiled",)


def _inputs(length: int, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(length)
    shapes = [(length, heads, sizes.dim) for heads in (sizes.heads, sizes.groups, sizes.groups, sizes.heads)]
    return [torch.randn(s, generator=generator, device=device).to(dtype) for s in shapes]


def correctness(sizes: Sizes, device: torch.device) -> Table:
    """Each kernel against attention's definition in float64, over rows of every layout."""
    rows = []
    length = min(1024, sizes.lengths[0])
    for kernel in kernels_on(device):
        for dtype in (torch.float32, torch.bfloat16):
            worst = [0.0] * 4
            for packed in timed_rows(length).values():
                layout_KL = torch.from_numpy(packed.layout_KL).to(device)
                *leaves, grad_LHD = _inputs(len(packed), sizes, device, dtype)
                exact = dense_attended(*leaves, grad_LHD, dense_mask(layout_KL), sizes.dim**-0.5)
                leaves = [leaf.requires_grad_() for leaf in leaves]
                out_LHD = path_attention(*leaves, layout_KL, sizes.dim**-0.5, kernel)
                out_LHD.backward(grad_LHD)
                found = [out_LHD, *(leaf.grad for leaf in leaves)]
                wanted = [exact.out, exact.query_grad, exact.key_grad, exact.value_grad]
                errors = [
                    ((ours - theirs).abs().max() / theirs.abs().max()).item()
                    for ours, theirs in zip(found, wanted, strict=True)
                ]
                worst = [max(pair) for pair in zip(worst, errors, strict=True)]
            name = str(dtype).removeprefix("torch.")
            rows.append([kernel, name, *(f"{error:.1e}" for error in worst)])
    columns = ("kernel", "numbers", "output", "dQ", "dK", "dV")
    return Table(f"Largest error by the largest number, rows of {length} of every layout", columns, rows)


def ratios(sizes: Sizes, device: torch.device) -> Table:
    """Each kernel on each row beside FlashAttention on as many causal tokens, and SDPA under a dense mask."""
    rows = []
    for length in sizes.lengths:
        inputs = _inputs(length, sizes, device, torch.bfloat16)
        flash = _both(_causal, _repeated(inputs), sizes, device)
        flash_pairs = length * (length + 1) // 2
        for name, packed in timed_rows(length).items():
            layout_KL = torch.from_numpy(packed.layout_KL).to(device)
            inputs, pairs = (
                _inputs(len(packed), sizes, device, torch.bfloat16),
                visible_pairs(packed.layout_KL),
            )
            dense = None
            if length <= sizes.dense:
                call = partial(_dense, mask_LL=dense_mask(layout_KL))
                dense = _both(call, _repeated(inputs), sizes, device)
            for kernel in kernels_on(device):
                call = partial(_ours, layout_KL=layout_KL, kernel=kernel)
                ours = _both(call, inputs, sizes, device)
                rates = [
                    (pairs / mine.ms) / (flash_pairs / theirs.ms)
                    for mine, theirs in zip(ours, flash, strict=True)
                ]
                times = (
                    [theirs.ms / mine.ms for mine, theirs in zip(ours, dense, strict=True)] if dense else []
                )
                rows.append(
                    [
                        *(str(length), name, kernel, f"{pairs / flash_pairs:.2f}"),
                        *(f"{cost.ms:.2f}" for cost in ours),
                        *(f"{rate:.2f}" for rate in rates),
                        *([f"{time:.1f}" for time in times] or ["-", "-"]),
                        f"{ours[1].mib:.0f}",
                    ]
                )
    columns = (
        *("tokens", "row", "kernel", "share of causal pairs", "forward ms", "forward+backward ms"),
        *("rate by pair to FlashAttention's, forward", "forward+backward"),
        *("times dense-mask SDPA, forward", "forward+backward", "MiB"),
    )
    return Table("Attention in bfloat16", columns, rows)


def _ours(query: Tensor, key: Tensor, value: Tensor, layout_KL: Tensor, kernel: Kernel) -> Tensor:
    return path_attention(query, key, value, layout_KL, query.shape[2] ** -0.5, kernel)


def _repeated(inputs: list[Tensor]) -> list[Tensor]:
    """Keys and values for every query head, as not every version of SDPA shares them."""
    query_LHD, *shared_LGD, grad_LHD = inputs
    repeats = query_LHD.shape[1] // shared_LGD[0].shape[1]
    return [query_LHD, *(x_LGD.repeat_interleave(repeats, 1) for x_LGD in shared_LGD), grad_LHD]


def _causal(query_LHD: Tensor, key_LHD: Tensor, value_LHD: Tensor) -> Tensor:
    """FlashAttention, as torch has it."""
    batch = [part.transpose(0, 1)[None] for part in (query_LHD, key_LHD, value_LHD)]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if query_LHD.is_cuda else nullcontext():
        return F.scaled_dot_product_attention(*batch, is_causal=True)[0].transpose(0, 1)


def _dense(query_LHD: Tensor, key_LHD: Tensor, value_LHD: Tensor, mask_LL: Tensor) -> Tensor:
    batch = [part.transpose(0, 1)[None] for part in (query_LHD, key_LHD, value_LHD)]
    return F.scaled_dot_product_attention(*batch, attn_mask=mask_LL)[0].transpose(0, 1)


def _both(call: Attend, inputs: list[Tensor], sizes: Sizes, device: torch.device) -> tuple[Cost, Cost]:
    """Forward alone, and forward with backward."""
    *parts, grad_LHD = inputs
    with torch.no_grad():
        forward = cost_of(lambda: call(*parts), device, sizes.repeats)
    leaves = [part.detach().requires_grad_() for part in parts]

    def both() -> None:
        torch.autograd.grad(call(*leaves), leaves, grad_LHD)

    return forward, cost_of(both, device, sizes.repeats)
