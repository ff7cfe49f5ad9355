"""The fake library's products and norms, in float32 of what the operands hold; results in the asked dtype.

Shapes: R rows, C columns of a matrix, T tokens, E hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.fake_engine.quantized import create_empty_quantized_tensor, quantize, torch_dtype


def read(operand: Any, by_columns: bool) -> Tensor:
    """A matrix [R, C] in float32, from the copy by rows or the one by columns (quantized.py).

    Raises:
        RuntimeError: Transformer Engine's Python did not make that copy.
    """
    from transformer_engine.pytorch import tensor as classes

    if isinstance(operand, classes.Float8BlockwiseQTensorStorage):
        side = "columnwise" if by_columns else "rowwise"
        data, scale = getattr(operand, f"_{side}_data"), getattr(operand, f"_{side}_scale_inv")
        other = "rowwise" if by_columns else "columnwise"
        if data is None:
            raise RuntimeError(f"no {side} copy of an operand")
        copy = classes.Float8BlockwiseQTensorStorage(
            **{f"{side}_data": data, f"{side}_scale_inv": scale},
            **{f"{other}_data": None, f"{other}_scale_inv": None},
            fp8_dtype=operand._fp8_dtype,
            quantizer=operand._quantizer,
            is_2D_scaled=operand._is_2D_scaled,
        )
        values = copy.dequantize(dtype=torch.float32)
        return values.reshape(-1, values.shape[-1])
    if isinstance(operand, classes.Float8TensorStorage):
        data = operand._transpose if by_columns else operand._data
        if data is None or (by_columns and operand._transpose_invalid):
            raise RuntimeError(f"no {'columnwise' if by_columns else 'rowwise'} copy of an operand")
        values = data.view(torch_dtype(operand._fp8_dtype)).float() * operand._scale_inv
        return values.reshape(len(values), -1).T if by_columns else values.reshape(-1, values.shape[-1])
    return operand.detach().float().reshape(-1, operand.shape[-1])


@torch.no_grad()
def generic_gemm(
    left: Any,
    transpose_left: bool,
    right: Any,
    transpose_right: bool,
    out: Tensor | None,
    quantizer: Any,
    out_dtype: Any,
    bias: Tensor | None,
    bias_dtype: Any,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    *,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Tensor | None = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> tuple[Any, Tensor | None, None, Tensor | None]:
    """The product `right` @ `left`, each transposed or not, as BLAS sees row-major matrices.

    Returns:
        The product with the leading dimensions of `right`, the bias's gradient, no input of GELU,
        `extra_output`.
    """
    if gelu or comm_overlap is not None or alpha != 1.0:
        raise NotImplementedError("the fake library's product has no GELU, overlap or factor")
    right_RC = read(right, by_columns=transpose_right)
    left_RC = read(left, by_columns=not transpose_left)
    result = (right_RC.T if transpose_right else right_RC) @ (left_RC.T if transpose_left else left_RC)
    if bias is not None and not grad:
        result += bias.float()
    dtype = torch_dtype(out_dtype) if out_dtype is not None else (left.dtype if out is None else out.dtype)
    if not transpose_right:
        result = result.view(*right.shape[:-1], result.shape[-1])
    bias_grad = right_RC.sum(0).to(dtype) if grad and bias is not None else None
    if out is not None:
        result = out.copy_(result.view_as(out) + (out.float() if accumulate else 0.0))
    elif quantizer is not None:
        result = quantize(result.to(dtype), quantizer)
    else:
        result = result.to(dtype)
    return result, bias_grad, None, extra_output


@torch.no_grad()
def rmsnorm_fwd(
    x_TE: Tensor,
    weight_E: Tensor,
    eps: float,
    out: Tensor | None,
    quantizer: Any,
    dtype: Any,
    sm_margin: int,
    zero_centered: bool,
) -> tuple[Any, None, Tensor]:
    """Root mean square norm (arXiv 1910.07467); returns it, no mean, and 1 / RMS of each row.

    With delayed scaling the kernel casts float32 results; otherwise it casts what it rounded to `dtype`.
    """
    wide_TE, wide_E = x_TE.detach().float(), weight_E.detach().float() + float(zero_centered)
    scale_T = torch.rsqrt(wide_TE.square().mean(-1) + eps)
    result_TE = wide_TE * scale_T[:, None] * wide_E
    if quantizer is None:
        return result_TE.to(torch_dtype(dtype)), None, scale_T
    if not hasattr(quantizer, "scale"):
        return quantize(result_TE.to(torch_dtype(dtype)), quantizer), None, scale_T
    cast = create_empty_quantized_tensor(quantizer, result_TE.shape, torch_dtype(dtype))
    return quantize(result_TE, quantizer, cast), None, scale_T


@torch.no_grad()
def rmsnorm_bwd(
    grad_TE: Tensor, x_TE: Tensor, scale_T: Tensor, weight_E: Tensor, sm_margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the norm's input and weight."""
    unit_TE = x_TE.float() * scale_T[:, None]
    wide_TE = grad_TE.float()
    inner_TE = wide_TE * (weight_E.float() + float(zero_centered))
    along_T1 = (inner_TE * unit_TE).mean(-1, keepdim=True)
    x_grad_TE = (inner_TE - unit_TE * along_T1) * scale_T[:, None]
    return x_grad_TE.to(x_TE.dtype), (wide_TE * unit_TE).sum(0).to(weight_E.dtype)
