"""FP8 numbers by scale: how a scale follows from the largest value, and casts of tensors and blocks.

arXiv 2209.05433 (the formats, one scale a tensor), 2412.19437 (one for 128 values, or 128 x 128).

Shapes: R rows, C columns, S values under one scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128


def largest(dtype: torch.dtype) -> float:
    """The largest finite number of an FP8 dtype: 448 of e4m3, 57344 of e5m2."""
    return torch.finfo(dtype).max


def scale_of(
    amax: Tensor,
    limit: float,
    powers_of_two: bool = False,
    epsilon: float = 0.0,
    infinite: float | None = None,
) -> Tensor:
    """The factors by which values are multiplied before the cast, float32, in the shape of `amax`.

    Args:
        amax: the largest absolute value under each scale.
        limit: the largest number of the FP8 dtype.
        powers_of_two: round the factors down to powers of two, so that scaling is exact.
        epsilon: smallest `amax` that counts.
        infinite: stands for a factor that float32 cannot hold; None: float32's largest number.
    """
    amax = amax.float().clamp(min=epsilon)
    scale = torch.full_like(amax, limit) / amax  # a number / tensor would round twice
    scale = scale.clamp(max=torch.finfo(torch.float32).max if infinite is None else infinite)
    if powers_of_two:
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(mantissa), exponent - 1)
    return torch.where((amax == 0) | ~amax.isfinite(), torch.ones_like(scale), scale)


def cast(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Casts `values` * `scale` to FP8, rounded to nearest even; the largest number bounds it."""
    limit = largest(dtype)
    return (values.float() * scale).clamp(-limit, limit).to(dtype)


def cast_rows(
    values_RC: Tensor, dtype: torch.dtype, powers_of_two: bool, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Casts with a scale for every 128 values of a row.

    Returns:
        FP8 [R, C] and inverse scales [ceil(C / 128), R].
    """
    rows, columns = values_RC.shape
    padded_RC = torch.nn.functional.pad(values_RC.float(), (0, -columns % BLOCK))
    blocks_RBS = padded_RC.view(rows, -1, BLOCK)
    infinite = torch.finfo(values_RC.dtype).max
    scale_RB = scale_of(blocks_RBS.abs().amax(-1), largest(dtype), powers_of_two, epsilon, infinite)
    cast_RC = cast(blocks_RBS, scale_RB[..., None], dtype).reshape(rows, -1)[:, :columns]
    return cast_RC.contiguous(), scale_RB.reciprocal().T


def cast_squares(
    values_RC: Tensor, dtype: torch.dtype, powers_of_two: bool, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Casts with a scale for every 128 x 128 values; returns FP8 [R, C] and inverse scales, one a square."""
    infinite = torch.finfo(values_RC.dtype).max
    amax = square_amax(values_RC)
    scale = scale_of(amax, largest(dtype), powers_of_two, epsilon, infinite)
    return cast(values_RC, spread(scale, values_RC.shape), dtype), scale.reciprocal()


def square_amax(values_RC: Tensor) -> Tensor:
    """The largest absolute value of every 128 x 128 values, float32 [ceil(R / 128), ceil(C / 128)]."""
    rows, columns = values_RC.shape
    padded_RC = torch.nn.functional.pad(values_RC.float().abs(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    return padded_RC.view(padded_RC.shape[0] // BLOCK, BLOCK, -1, BLOCK).amax((1, 3))


def spread(by_square: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Repeats a value of every 128 x 128 for each of its elements; returns `shape` [R, C]."""
    rows, columns = shape
    return by_square.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
