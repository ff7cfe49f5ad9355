"""The fake library's kernels over many tensors: the optimizer's, and the scales of delayed scaling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.fake_engine.casts import largest, scale_of
from tests.fake_engine.quantized import torch_dtype


def multi_tensor_scale(chunk: int, noop: Tensor, lists: list[list[Tensor]], scale: float) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


def multi_tensor_l2norm(
    chunk: int, noop: Tensor, lists: list[list[Tensor]], per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    norms = torch.stack([tensor.float().norm() for tensor in lists[0]])
    return norms.norm()[None], norms if per_tensor else norms.new_empty(0)


def multi_tensor_adam(
    chunk: int,
    noop: Tensor,
    lists: list[list[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    decoupled: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """Adam with decoupled weight decay (arXiv 1711.05101) on float32 gradients, weights and both moments."""
    if not decoupled or len(lists) != 4:
        raise NotImplementedError("the fake library's Adam has decoupled weight decay and float32 weights")
    first, second = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for grad, weight, mean, square in zip(*lists, strict=True):
        mean.mul_(beta1).add_(grad, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        change = (mean / first) / ((square / second).sqrt_() + eps)
        weight.sub_(change.add_(weight, alpha=weight_decay), alpha=lr)


def multi_tensor_compute_scale_and_scale_inv(
    chunk: int, noop: Tensor, lists: list[list[Tensor]], limit: float, powers_of_two: bool, epsilon: float
) -> None:
    for amax, scale, inverse in zip(*lists, strict=True):
        scale.copy_(scale_of(amax, limit, powers_of_two, epsilon))
        inverse.copy_(scale.reciprocal().view_as(inverse))


def fused_amax_and_scale_update_after_reduction(
    amaxes: Tensor, histories: list[Tensor], scales: list[Tensor], algorithm: str, dtype: Any, margin: int
) -> None:
    """Delayed scaling's scales of the next step from each tensor's amaxes of past steps (arXiv 2209.05433).

    Args:
        amaxes: of this step, of all tensors one after another, already the largest of all ranks.
        histories: [steps, tensors] each; row 0 collects, and is 0 afterwards.
        algorithm: `max` of the history, or `most_recent`.
    """
    limit = largest(torch_dtype(dtype))
    for now, history, scale in zip(amaxes.split([len(s) for s in scales]), histories, scales, strict=True):
        history[0] = now
        amax = history.amax(0) if algorithm == "max" else now
        found = (torch.full_like(amax, limit) / amax / 2**margin).clamp(max=torch.finfo(torch.float32).max)
        scale.copy_(torch.where((amax > 0) & amax.isfinite(), found, scale))
        history.copy_(history.roll(-1, 0))
        history[0] = 0
