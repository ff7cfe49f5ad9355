"""Attention under a layout: correctness against its definition, and speed compared with alternatives.

Shapes: L tokens, Q queries, H query heads, G key/value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.clock import Cost, cost_of, free_memory
from benchmarks.gpu.rows import dense_mask, timed_rows, visible_pairs
from benchmarks.gpu.sizes import Sizes
from benchmarks.page import Table
from megatron_parallel_r1.model.attention.dispatch import Kernel, path_attention
from megatron_parallel_r1.thought.packing import context_indices
from tests.unit.model.kernels.dense import dense_attended

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
# Limits of max |error| / max |value|. float32: sums of up to a thousand products, each rounded to 2^-24, and
# a GPU's exp2 with 2 ulp. bfloat16: weights, gradients of scores and results are rounded to 2^-8.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2**-6}


def kernels_on(device: torch.device) -> tuple[Kernel, ...]:
    """Kernels that can train on the device; the first is the choice of `auto`."""
    return ("triton", "flex", "tiled") if device.type == "cuda" else ("sdpa", "tiled")


def _inputs(length: int, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(length)
    shapes = [(length, heads, sizes.dim) for heads in (sizes.heads, sizes.groups, sizes.groups, sizes.heads)]
    return [torch.randn(s, generator=generator, device=device).to(dtype) for s in shapes]


def _errors(
    inputs: Sequence[Tensor], layout_KL: Tensor, here_Q: Tensor, kernel: Kernel, dim: int
) -> list[float]:
    """Relative errors of output, dQ, dK and dV for the queries `here_Q` of a row."""
    query_LHD, key_LGD, value_LGD, grad_LHD = inputs
    inputs_QHD, grad_QHD = (query_LHD[here_Q], key_LGD, value_LGD), grad_LHD[here_Q]
    exact = dense_attended(*inputs_QHD, grad_QHD, dense_mask(layout_KL)[here_Q], dim**-0.5)
    leaves = [x.clone().requires_grad_() for x in inputs_QHD]
    out_QHD = path_attention(*leaves, layout_KL[:, here_Q].contiguous(), dim**-0.5, kernel)
    out_QHD.backward(grad_QHD)
    actual = [out_QHD, *(leaf.grad for leaf in leaves)]
    expected = [exact.out, exact.query_grad, exact.key_grad, exact.value_grad]
    return [
        ((ours - theirs).abs().max() / theirs.abs().max()).item()
        for ours, theirs in zip(actual, expected, strict=True)
    ]


def correctness(sizes: Sizes, device: torch.device) -> Table:
    """Each kernel against attention's definition in float64, over rows of every layout, whole and split."""
    rows = []
    length = min(1024, sizes.lengths[0])
    for kernel in kernels_on(device):
        for dtype, limit in LIMITS.items():
            worst = [0.0] * 4
            for packed in timed_rows(length).values():
                layout_KL = torch.from_numpy(packed.layout_KL).to(device)
                inputs = _inputs(len(packed), sizes, device, dtype)
                for parts in (1, 2):
                    # The last rank's two chunks of an even row, as in context parallelism.
                    even = len(packed) // (2 * parts) * 2 * parts
                    here_Q = torch.from_numpy(context_indices(even, parts - 1, parts)).to(device)
                    errors = _errors(inputs, layout_KL, here_Q, kernel, sizes.dim)
                    worst = [max(pair) for pair in zip(worst, errors, strict=True)]
            name = str(dtype).removeprefix("torch.")
            right = "yes" if max(worst) < limit else "NO"
            rows.append([kernel, name, *(f"{error:.1e}" for error in worst), f"{limit:.1e}", right])
    columns = ("kernel", "numbers", "output", "dQ", "dK", "dV", "limit", "right")
    return Table(f"Largest relative error, rows of {length} of every layout", columns, rows)


@dataclass(frozen=True, slots=True)
class Timed:
    """Costs of one kernel on one row; pairs are (forward, forward + backward).

    Attributes:
        tokens: nominal length of the row.
        share: visible pairs / pairs of causal attention on as many tokens.
        ours: cost of the kernel.
        flash: cost of causal FlashAttention on as many tokens.
        dense: cost of SDPA with a dense mask; None if not measured at this length.
    """

    tokens: int
    row: str
    kernel: Kernel
    share: float
    ours: tuple[Cost, Cost]
    flash: tuple[Cost, Cost]
    dense: tuple[Cost, Cost] | None

    @property
    def times_flash(self) -> list[float]:
        return [theirs.ms / ours.ms for ours, theirs in zip(self.ours, self.flash, strict=True)]

    @property
    def of_bound(self) -> list[float]:
        """FlashAttention's time for the visible pairs only / our time: the ratio of rates per pair."""
        return [self.share * times for times in self.times_flash]

    @property
    def times_dense(self) -> list[float]:
        if self.dense is None:
            return []
        return [theirs.ms / ours.ms for ours, theirs in zip(self.ours, self.dense, strict=True)]


def timings(sizes: Sizes, device: torch.device) -> list[Timed]:
    """Each kernel on each row, compared with causal and dense-mask attention."""
    timed = []
    for length in sizes.lengths:
        causal: dict[int, tuple[Cost, Cost]] = {}  # by number of tokens: a replay row is longer
        for name, packed in timed_rows(length).items():
            tokens = len(packed)
            layout_KL = torch.from_numpy(packed.layout_KL).to(device)
            inputs = _inputs(tokens, sizes, device, torch.bfloat16)
            if tokens not in causal:
                causal[tokens] = _both(_causal, _repeated(inputs), sizes, device)
            dense = None
            if length <= sizes.dense:
                call = partial(_dense, mask_LL=dense_mask(layout_KL))
                dense = _both(call, _repeated(inputs), sizes, device)
            share = visible_pairs(packed.layout_KL) / (tokens * (tokens + 1) // 2)
            for kernel in kernels_on(device):
                call = partial(_ours, layout_KL=layout_KL, kernel=kernel)
                ours = _both(call, inputs, sizes, device)
                timed.append(Timed(length, name, kernel, share, ours, causal[tokens], dense))
            free_memory(device)
    return timed


def ratios(timings: Sequence[Timed]) -> Table:
    """The table of all timings."""
    rows = [
        [
            *(str(timed.tokens), timed.row, timed.kernel, f"{timed.share:.2f}"),
            *(f"{cost.ms:.2f}" for cost in timed.ours),
            *(f"{times:.2f}" for times in (*timed.times_flash, *timed.of_bound)),
            *([f"{times:.1f}" for times in timed.times_dense] or ["-", "-"]),
            f"{timed.ours[1].mib:.0f}",
        ]
        for timed in timings
    ]
    columns = (
        *("tokens", "row", "kernel", "share of causal pairs", "forward ms", "forward+backward ms"),
        *("times causal FlashAttention, forward", "forward+backward"),
        *("of the bound by visible pairs, forward", "forward+backward"),
        *("times dense-mask SDPA, forward", "forward+backward", "MiB"),
    )
    note = (
        "FlashAttention is torch's, causal, on as many tokens as the row has. The bound is its time scaled "
        "to the visible pairs."
    )
    return Table("Attention in bfloat16", columns, rows, note)


def _ours(query: Tensor, key: Tensor, value: Tensor, layout_KL: Tensor, kernel: Kernel) -> Tensor:
    return path_attention(query, key, value, layout_KL, query.shape[2] ** -0.5, kernel)


def _repeated(inputs: list[Tensor]) -> list[Tensor]:
    """Repeats keys and values for every query head: not every SDPA version supports grouped heads."""
    query_LHD, *shared_LGD, grad_LHD = inputs
    repeats = query_LHD.shape[1] // shared_LGD[0].shape[1]
    return [query_LHD, *(x_LGD.repeat_interleave(repeats, 1) for x_LGD in shared_LGD), grad_LHD]


def _causal(query_LHD: Tensor, key_LHD: Tensor, value_LHD: Tensor) -> Tensor:
    """torch's FlashAttention."""
    batch = [part.transpose(0, 1)[None] for part in (query_LHD, key_LHD, value_LHD)]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if query_LHD.is_cuda else nullcontext():
        return F.scaled_dot_product_attention(*batch, is_causal=True)[0].transpose(0, 1)


def _dense(query_LHD: Tensor, key_LHD: Tensor, value_LHD: Tensor, mask_LL: Tensor) -> Tensor:
    batch = [part.transpose(0, 1)[None] for part in (query_LHD, key_LHD, value_LHD)]
    return F.scaled_dot_product_attention(*batch, attn_mask=mask_LL)[0].transpose(0, 1)


def _both(call: Attend, inputs: list[Tensor], sizes: Sizes, device: torch.device) -> tuple[Cost, Cost]:
    """Costs of forward, and of forward + backward."""
    *parts, grad_LHD = inputs
    with torch.no_grad():
        forward = cost_of(lambda: call(*parts), device, sizes.repeats)
    leaves = [part.detach().requires_grad_() for part in parts]

    def both() -> None:
        torch.autograd.grad(call(*leaves), leaves, grad_LHD)

    return forward, cost_of(both, device, sizes.repeats)
