"""FP8 from its definition, number by number: casts, blocks and the three products of a linear layer.

Formats: arXiv 2209.05433 (e4m3 has no infinity, e5m2 does; both are cast with saturation here). Slow.

Shapes: R rows, C columns; T tokens, I input and O output size of a layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# Mantissa bits, exponent of the smallest normal number, largest number.
FORMATS = {torch.float8_e4m3fn: (3, -6, 448.0), torch.float8_e5m2: (2, -14, 57344.0)}
Scaling = Literal["delayed", "current", "blockwise"]


def rounded(value: float, dtype: torch.dtype) -> float:
    """The nearest number of the format, of two equally near ones that with an even mantissa."""
    bits, smallest, limit = FORMATS[dtype]
    if value == 0:
        return value
    exponent = max(math.frexp(value)[1] - 1, smallest)
    step = 2.0 ** (exponent - bits)
    return max(-limit, min(limit, round(value / step) * step))  # Python rounds halves to even


def scale_of(amax: float, dtype: torch.dtype, powers_of_two: bool) -> float:
    """limit / amax in float32, rounded down to a power of two if asked; 1 for 0."""
    if amax == 0:
        return 1.0
    scale = torch.tensor(FORMATS[dtype][2], dtype=torch.float32) / torch.tensor(amax, dtype=torch.float32)
    return 2.0 ** math.floor(math.log2(scale.item())) if powers_of_two else scale.item()


def round_trip(values_RC: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """Casts under a scale and back, float32 [R, C]."""
    scaled = (values_RC.float() * scale).flatten().tolist()  # the multiplication is float32's
    found = torch.tensor([rounded(value, dtype) for value in scaled], dtype=torch.float32)
    inverse = torch.tensor(scale, dtype=torch.float32).reciprocal()
    return (found * inverse).view(values_RC.shape)


def blocks_round_trip(values_RC: Tensor, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
    """The same with a scale, a power of two, for every `rows` x `columns` values."""
    out_RC = torch.empty(values_RC.shape)
    for row in range(0, values_RC.shape[0], rows):
        for column in range(0, values_RC.shape[1], columns):
            here = (slice(row, row + rows), slice(column, column + columns))
            scale = scale_of(values_RC[here].abs().max().item(), dtype, powers_of_two=True)
            out_RC[here] = round_trip(values_RC[here], dtype, scale)
    return out_RC


@dataclass(frozen=True)
class Products:
    """A layer's output and gradients, float32."""

    out_TO: Tensor
    x_grad_TI: Tensor
    weight_grad_OI: Tensor


def linear(
    x_TI: Tensor, weight_OI: Tensor, grad_TO: Tensor, scaling: Scaling, scales: tuple[float, ...] = ()
) -> Products:
    """Products in float32 of operands that were cast to FP8.

    Args:
        scales: with delayed scaling those of input, weight and gradient.
    """
    forward = torch.float8_e4m3fn
    backward = forward if scaling == "blockwise" else torch.float8_e5m2
    if scaling == "blockwise":
        # Blocks lie along the dimension that a product sums over; a weight's are square.
        weight = blocks_round_trip(weight_OI, forward, 128, 128)
        return Products(
            blocks_round_trip(x_TI, forward, 1, 128) @ weight.T,
            blocks_round_trip(grad_TO, backward, 1, 128) @ weight,
            blocks_round_trip(grad_TO, backward, 128, 1).T @ blocks_round_trip(x_TI, forward, 128, 1),
        )
    dtypes = (forward, forward, backward)
    operands = (x_TI, weight_OI, grad_TO)
    scales = scales or tuple(
        scale_of(operand.abs().max().item(), dtype, powers_of_two=False)
        for operand, dtype in zip(operands, dtypes, strict=True)
    )
    x, weight, grad = (
        round_trip(operand, dtype, scale)
        for operand, dtype, scale in zip(operands, dtypes, scales, strict=True)
    )
    return Products(x @ weight.T, grad @ weight, grad.T @ x)
