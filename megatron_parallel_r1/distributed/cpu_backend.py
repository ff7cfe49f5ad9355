"""Runs Megatron-Core on a machine without CUDA.

Megatron's Python code names CUDA devices, streams and tensor types, though nothing computed here needs them.
`patch_megatron` redirects exactly those names to the CPU. It patches names and wraps no operators, so forward
and backward run at the speed of plain torch. On a machine with CUDA it does nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from megatron.core import utils
from megatron.core.optimizer import clip_grads, optimizer
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel import random as tensor_parallel_random
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher


class _CpuTorch(ModuleType):
    """`torch` as one Megatron module sees it, whose tensor factories take device="cuda" for the CPU."""

    def __init__(self) -> None:
        super().__init__("torch")
        for name in ("tensor", "zeros", "ones", "empty"):
            setattr(self, name, _without_cuda(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _without_cuda(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return on_cpu


def _cuda_type_name(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> str | torch.Tensor:
    result = torch._C.TensorBase.type(tensor, *args, **kwargs)
    return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result


def _get_rng_state(device: object = None) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(state)


def _cpu_device() -> torch.device:
    return torch.device("cpu")


def _counts_on_cpu(
    dispatcher: MoEAlltoAllTokenDispatcher, point: str, tokens_per_expert: torch.Tensor | None = None
) -> torch.Tensor | None:
    """Gives the numbers of tokens to exchange the types that Megatron's copy to the CPU would."""
    if point == dispatcher.cuda_dtoh_point:
        for name in ("input_splits", "output_splits", "output_splits_tp"):
            if isinstance(splits := getattr(dispatcher, name), torch.Tensor):
                setattr(dispatcher, name, splits.numpy())
    return tokens_per_expert


def _l2_norm(
    chunk_size: int, overflow: torch.Tensor, tensor_lists: list[list[torch.Tensor]], per_tensor: bool
) -> tuple[torch.Tensor, None]:
    """The norm [1] of all tensors together."""
    return torch.stack(torch._foreach_norm(tensor_lists[0])).norm()[None], None


def _no_op(*args: object, **kwargs: object) -> None:
    return None


def _replace(owner: object, name: str, value: object) -> None:
    """Sets an attribute whose declared type the replacement does not have."""
    setattr(owner, name, value)


def patch_megatron() -> None:
    """Lets Megatron-Core run on the CPU, and on a GPU without a wait for each parameter. Repeatable."""
    if torch.cuda.is_available():
        # Without Transformer Engine and Apex it copies each parameter's norm to the host.
        if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
            _replace(clip_grads, "l2_norm_impl", _l2_norm)
        return
    if isinstance(schedules.torch, _CpuTorch):
        return
    # Where Megatron allocates weights, gradient buffers and receive buffers.
    _replace(torch.cuda, "current_device", _cpu_device)
    # Called around communication, timers and checkpoints; CPU work is never pending.
    torch.cuda.synchronize = _no_op
    # The states that activation checkpointing and sequence-parallel regions fork and restore.
    _replace(torch.cuda, "manual_seed", torch.manual_seed)
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = _get_rng_state
    tensor_parallel_random._set_cuda_rng_state = _set_rng_state
    # A step's token count, the loss scale and the norm buffers are created with device="cuda".
    for module in (schedules, optimizer, clip_grads, utils):
        module.torch = _CpuTorch()
    # Pipeline stages with tied embeddings pass their copies of the weight through it.
    _replace(torch.Tensor, "cuda", lambda tensor, *args, **kwargs: tensor)
    # The optimizers distinguish parameters by type name and reject any that is not torch.cuda.*.
    _replace(torch.Tensor, "type", _cuda_type_name)
    # The counts of tokens per expert are copied to the CPU on their own stream.
    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = torch.device("cpu")
    MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize = _counts_on_cpu
