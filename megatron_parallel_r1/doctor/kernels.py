"""Each attention kernel that runs here, against attention's definition in float64.

Shapes: L tokens, H query heads, G key/value heads, D head dimension, K rows of the layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_parallel_r1.doctor.findings import Finding
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.model.attention.dispatch import Kernel, check_kernel, path_attention
from megatron_parallel_r1.thought.layout import Mode, lay_out
from megatron_parallel_r1.thought.packing import PackedRow, concatenate
from megatron_parallel_r1.thought.parser import parse
from megatron_parallel_r1.thought.tags import Tags

KERNELS: tuple[Kernel, ...] = ("sdpa", "tiled", "triton", "flex")
MODES: tuple[Mode, ...] = ("isolated", "replay", "causal")
HEADS, GROUPS, DIM = 4, 2, 64
# Of the largest value. float32: sums of some hundred products, each rounded to 2^-24, and a GPU's exp2 with
# 2 units in the last place. bfloat16: weights, gradients of scores and results are rounded to 2^-8.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2**-6}
TAGS = Tags(parallel=0, parallel_end=1, path=2, path_end=3, summary=4, summary_end=5, eos=6)


def attention(device: torch.device) -> list[Finding]:
    """Outputs and gradients of rows of every mode, in float32 and bfloat16."""
    rows = [_row(mode) for mode in MODES]
    findings = []
    for kernel in KERNELS:
        try:
            check_kernel(kernel, device, DIM)
        except UserError:
            continue  # for other devices
        errors = {dtype: max(_error(row, kernel, dtype, device) for row in rows) for dtype in LIMITS}
        found = ", ".join(f"{_name(dtype)} {error:.1e}" for dtype, error in errors.items())
        if all(error <= LIMITS[dtype] for dtype, error in errors.items()):
            findings.append(Finding(f"attention {kernel}", f"largest relative error: {found}"))
        else:
            advice = "set model.attention to another kernel, and report it with this table"
            findings.append(Finding(f"attention {kernel}", f"wrong by {found}", "fault", advice))
    return findings


def _row(mode: Mode, blocks: int = 2, paths: int = 3, words: int = 50) -> PackedRow:
    """Two packed traces with blocks of sibling paths."""
    path = [TAGS.path, *[7] * words, TAGS.path_end]
    block = [TAGS.parallel, *path * paths, *TAGS.joined, 8, 8, TAGS.ids[-1]]
    tokens = [9, 9, *block * blocks, 9, TAGS.eos]
    tree = parse(tokens, TAGS)
    row = lay_out([7] * 10, tokens, [True] * len(tokens), tree, mode)
    return concatenate([row, row], [0, 1])


def _error(packed: PackedRow, kernel: Kernel, dtype: torch.dtype, device: torch.device) -> float:
    """The largest error of output, dQ, dK and dV, each relative to its largest value."""
    layout_KL = torch.from_numpy(packed.layout_KL).to(device)
    generator = torch.Generator().manual_seed(1)
    shapes = [(len(packed), heads, DIM) for heads in (HEADS, GROUPS, GROUPS, HEADS)]
    *inputs, grad_LHD = (torch.randn(s, generator=generator).to(device, dtype) for s in shapes)
    found = _attended(inputs, grad_LHD, lambda q, k, v: path_attention(q, k, v, layout_KL, DIM**-0.5, kernel))
    exact = _attended(
        [x.double() for x in inputs],
        grad_LHD.double(),
        lambda q, k, v: definition(q, k, v, layout_KL, DIM**-0.5),
    )
    errors = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, exact, strict=True)]
    return math.inf if any(map(math.isnan, errors)) else max(errors)


def definition(
    query_LHD: Tensor, key_LGD: Tensor, value_LGD: Tensor, layout_KL: Tensor, scale: float
) -> Tensor:
    """Attention with the whole mask and the whole softmax; [L, H, D].

    A token sees the keys from its row's start to itself, but for the hidden intervals (thought/layout.py).
    """
    key_L = torch.arange(layout_KL.shape[1], device=layout_KL.device)
    index_L1, start_L1, *hidden_L1 = layout_KL[:, :, None]
    sees_LL = (start_L1 <= key_L) & (key_L <= index_L1)
    for low_L1, high_L1 in zip(hidden_L1[::2], hidden_L1[1::2], strict=True):
        sees_LL = sees_LL & ((key_L < low_L1) | (high_L1 <= key_L))
    repeats = query_LHD.shape[1] // key_LGD.shape[1]
    key_LHD, value_LHD = (x.repeat_interleave(repeats, 1) for x in (key_LGD, value_LGD))
    scores_HLL = torch.einsum("qhd,khd->hqk", query_LHD, key_LHD) * scale
    weights_HLL = scores_HLL.masked_fill(~sees_LL, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights_HLL, value_LHD)


def _attended(
    inputs: Sequence[Tensor], grad_LHD: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> tuple[Tensor, ...]:
    """Output and the gradients of queries, keys and values."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out_LHD = attend(*leaves)
    grads = torch.autograd.grad(out_LHD, leaves, grad_LHD)
    return out_LHD.detach(), *grads


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
