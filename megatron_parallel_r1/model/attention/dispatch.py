"""The interface of attention under a layout, and the choice of its kernel.

| kernel | runs on | implementation |
|---|---|---|
| `sdpa` | CPU | torch's fused kernel, called for parts of the row; the fastest there |
| `tiled` | CPU, CUDA | plain torch, also exact in float64 |
| `flex` | CUDA; forward on the CPU | torch's FlexAttention, compiled, with a block mask from the layout |
| `triton` | CUDA | this package's own kernels; the fastest here |

Shapes: Q queries, L keys, H query heads in G groups that share a key/value head, D head dimension, K rows of
the layout.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.model.attention.sdpa import sdpa_attention
from megatron_parallel_r1.model.attention.tiled import tiled_attention

Kernel = Literal["auto", "sdpa", "tiled", "flex", "triton"]
# The largest head dimension for which the Triton kernels' tiles fit into a multiprocessor.
MAX_HEAD_DIM = 256


def check_kernel(kernel: str, device: torch.device, dim: int) -> None:
    """Checks before the start that a kernel can run.

    Raises:
        UserError: the kernel is unknown, or does not support this device, installation or head dimension.
    """
    if kernel not in get_args(Kernel):
        raise UserError(f"model.attention: {kernel!r} is not one of {', '.join(get_args(Kernel))}")
    if kernel in ("auto", "tiled"):
        return
    if kernel == "sdpa":
        if device.type != "cpu":
            raise UserError("model.attention: sdpa runs on a CPU only; set it to auto")
        return
    if device.type != "cuda" and not (kernel == "triton" and is_interpreted()):
        raise UserError(f"model.attention: {kernel} needs a CUDA device; set it to auto, or tiled")
    if kernel == "triton" and find_spec("triton") is None:
        raise UserError(
            "model.attention: triton is not installed; install a CUDA build of torch, or set flex"
        )
    if kernel == "triton" and dim > MAX_HEAD_DIM:
        raise UserError(
            f"model.attention: triton supports head dimensions to {MAX_HEAD_DIM}, not {dim}; set it to flex"
        )


def resolve_kernel(kernel: Kernel, query_QHD: Tensor) -> Kernel:
    """Resolves `auto`: `sdpa` on a CPU, elsewhere `triton` if it supports the heads, else `tiled`."""
    if kernel != "auto":
        return kernel
    if query_QHD.device.type == "cpu":
        return "sdpa"
    fits = query_QHD.is_cuda and query_QHD.shape[2] <= MAX_HEAD_DIM and query_QHD.dtype != torch.float64
    return "triton" if fits and find_spec("triton") is not None else "tiled"


def path_attention(
    query_QHD: Tensor,
    key_LGD: Tensor,
    value_LGD: Tensor,
    layout_KQ: Tensor,
    scale: float,
    kernel: Kernel = "auto",
) -> Tensor:
    """Attention of one packed row under its layout, differentiable once.

    Args:
        query_QHD, key_LGD, value_LGD: one dtype; the softmax is in float32 or wider. Query head h uses the
            key/value head h // (H / G).
        layout_KQ: int32. Every query must see at least one key; by definition a token sees itself.
        scale: of the scores.

    Returns:
        [Q, H, D] in the dtype of the query.

    Raises:
        UserError: the kernel does not run on this device.
    """
    kernel = resolve_kernel(kernel, query_QHD)
    if kernel == "tiled":
        return tiled_attention(query_QHD, key_LGD, value_LGD, layout_KQ, scale)
    if kernel == "flex":
        from megatron_parallel_r1.model.attention.flex import flex_attention

        return flex_attention(query_QHD, key_LGD, value_LGD, layout_KQ, scale)
    check_kernel(kernel, query_QHD.device, query_QHD.shape[2])
    if kernel == "sdpa":
        return sdpa_attention(query_QHD, key_LGD, value_LGD, layout_KQ, scale)
    # Triton is not installed on every machine.
    from megatron_parallel_r1.model.attention.triton_attention import kernel_attention

    return kernel_attention(query_QHD, key_LGD, value_LGD, layout_KQ, scale)[0]


def is_interpreted() -> bool:
    """Returns whether Triton's interpreter is on; Triton reads the variable when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET") == "1"
