"""The fake library's tensors in FP8: to make, fill, transpose and read them.

Transformer Engine's classes hold two copies of a matrix: by rows, and by columns transposed. On Hopper a
product takes only copies whose rows are what it sums over, so a copy that its Python forgot is an error here.

Shapes: R rows, C columns, N elements of a flat part of a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.fake_engine.casts import (
    BLOCK,
    cast,
    cast_rows,
    cast_squares,
    largest,
    scale_of,
    spread,
    square_amax,
)

CPU = torch.device("cpu")


def torch_dtype(dtype: Any) -> torch.dtype:
    """The torch dtype of one of Transformer Engine's own enum."""
    from transformer_engine.pytorch.constants import DType, TE_DType_To_Torch

    return TE_DType_To_Torch[DType.cast(dtype)]


def transposed(data: Tensor) -> Tensor:
    """The last dimension first: [..., C] becomes [C, ...]."""
    return data.movedim(-1, 0).contiguous()


def create_empty_quantized_tensor(
    quantizer: Any, shape: Sequence[int], dtype: torch.dtype, device: object = CPU, pin_memory: bool = False
) -> Any:
    """A tensor of the quantizer's class, whose values are 0."""
    from transformer_engine.pytorch import tensor as classes

    shape = tuple(shape)
    kinds = {
        side: torch.zeros(size, dtype=torch.uint8) if wanted else None
        for side, wanted, size in (
            ("rowwise", quantizer.rowwise_usage, shape),
            ("columnwise", quantizer.columnwise_usage, (*shape[-1:], *shape[:-1])),
        )
    }
    if isinstance(quantizer, classes.Float8BlockQuantizer):
        kind = (classes.Float8BlockwiseQTensorStorage, classes.Float8BlockwiseQTensor)
        arguments = {
            **{f"{side}_data": data for side, data in kinds.items()},
            **{
                f"{side}_scale_inv": None
                if data is None
                else torch.zeros(quantizer.get_scale_shape(shape, side == "columnwise"))
                for side, data in kinds.items()
            },
            "is_2D_scaled": quantizer.block_scaling_dim == 2,
        }
    else:
        kind = (classes.Float8TensorStorage, classes.Float8Tensor)
        arguments = {
            "data": kinds["rowwise"],
            "data_transpose": kinds["columnwise"],
            "fp8_scale_inv": torch.ones(1),
        }
    arguments |= {"fp8_dtype": quantizer.dtype, "quantizer": quantizer}
    if quantizer.internal:
        return kind[0](**arguments, fake_dtype=dtype)
    return kind[1](shape=shape, dtype=dtype, device=CPU, **arguments)


@torch.no_grad()
def quantize(values: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    """Casts to FP8, into `output` if there is one, unless the flag `noop` is 1."""
    from transformer_engine.pytorch import tensor as classes

    if noop is not None and noop.item() == 1:
        return output
    values = values.detach().contiguous()
    if output is None:
        output = create_empty_quantized_tensor(quantizer, values.shape, values.dtype)
    if not values.numel():  # of an expert without tokens
        return output
    if isinstance(quantizer, classes.Float8BlockQuantizer):
        _fill_blocks(values, quantizer, output)
    elif isinstance(quantizer, (classes.Float8Quantizer, classes.Float8CurrentScalingQuantizer)):
        _fill(values, quantizer, output)
    else:
        raise NotImplementedError(f"the fake library has no {type(quantizer).__name__}")
    return output


def _fill(values: Tensor, quantizer: Any, output: Any) -> None:
    """One scale a tensor: the quantizer's, by earlier amaxes, or that of the values' own amax."""
    dtype = torch_dtype(quantizer.dtype)
    amax = values.abs().amax().float()
    if hasattr(quantizer, "scale"):
        scale = quantizer.scale.detach().reshape(1)
        if quantizer.amax.numel():
            quantizer.amax.copy_(torch.maximum(quantizer.amax, amax))
    else:
        if quantizer.with_amax_reduction:
            dist.all_reduce(amax, dist.ReduceOp.MAX, group=quantizer._canonicalized_amax_reduction_group())
        scale = scale_of(amax, largest(dtype), quantizer.force_pow_2_scales, quantizer.amax_epsilon).reshape(
            1
        )
    data = cast(values, scale, dtype).view(torch.uint8)
    output._data = _put(output._data, data if quantizer.rowwise_usage else None)
    output._transpose = _put(output._transpose, transposed(data) if quantizer.columnwise_usage else None)
    output._transpose_invalid = not quantizer.columnwise_usage
    output._scale_inv.copy_(scale.reciprocal().view_as(output._scale_inv))


def _fill_blocks(values: Tensor, quantizer: Any, output: Any) -> None:
    dtype, shape = torch_dtype(quantizer.dtype), values.shape
    values_RC = values.reshape(-1, shape[-1])
    rules = (dtype, quantizer.force_pow_2_scales, quantizer.amax_epsilon)
    for side, wanted in (("rowwise", quantizer.rowwise_usage), ("columnwise", quantizer.columnwise_usage)):
        columnwise = side == "columnwise"
        data = scale = None
        if wanted:
            if quantizer.block_scaling_dim == 2:
                data, scale = cast_squares(values_RC, *rules)
                data, scale = (data.T, scale.T) if columnwise else (data, scale)
            else:
                # A column's blocks are those of a row of the transpose.
                data, scale = cast_rows(values_RC.T if columnwise else values_RC, *rules)
            data = data.contiguous().view(torch.uint8)
            data = data.view(shape[-1], *shape[:-1]) if columnwise else data.view(shape)
            padded = torch.zeros(quantizer.get_scale_shape(shape, columnwise))
            padded[: scale.shape[0], : scale.shape[1]] = scale
            scale = padded
        setattr(output, f"_{side}_data", _put(getattr(output, f"_{side}_data"), data))
        setattr(output, f"_{side}_scale_inv", _put(getattr(output, f"_{side}_scale_inv"), scale))


def _put(memory: Tensor | None, new: Tensor | None) -> Tensor | None:
    """Keeps the memory that views and buffers share."""
    if memory is None or new is None:
        return new
    memory.copy_(new.view_as(memory))
    return memory


def dequantize(tensor: Any, dtype: Any) -> Tensor:
    return tensor.dequantize(dtype=torch_dtype(dtype))


def fp8_transpose(data: Tensor, dtype: Any, *, out: Tensor | None = None) -> Tensor:
    return _put(out, transposed(data))


def compute_amax(values: Tensor, amax: Tensor) -> None:
    amax.copy_(values.detach().abs().amax().float().view_as(amax))


def fp8_block_scaling_compute_partial_amax(
    part_N: Tensor, amax: Tensor, rows: int, columns: int, start: int, block: int
) -> None:
    """The amax of each square as far as the elements from `start` on of the flattened matrix know it."""
    whole_N = torch.zeros(rows * columns)
    whole_N[start : start + part_N.numel()] = part_N.detach().float().reshape(-1)
    found = square_amax(whole_N.view(rows, columns))
    amax[: found.shape[0], : found.shape[1]] = found


def fp8_block_scaling_partial_cast(
    part_N: Tensor, out_N: Tensor, scale: Tensor, rows: int, columns: int, start: int, block: int, dtype: Any
) -> None:
    """Casts elements from `start` on of the flattened matrix, under the scales of its squares."""
    each_N = spread(scale[:, : -(-columns // BLOCK)], (rows, columns)).reshape(-1)
    each_N = each_N[start : start + part_N.numel()]
    out_N.copy_(
        cast(part_N.detach().reshape(-1), each_N, torch_dtype(dtype)).view(torch.uint8).view_as(out_N)
    )


def swap_first_dims(values: Tensor, *, out: Tensor | None = None) -> Tensor:
    return _put(out, values.transpose(0, 1).contiguous())
