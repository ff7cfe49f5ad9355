"""Takes gradients and optimizer off a trainer's GPU while colocated servers draw, and brings them back.

Gradient buffers are freed by Megatron's `offload_grad_buffers`; each update begins by zeroing them. Adam's
moments and master weights are copied to pinned host memory and come back bit for bit. Weights stay: the next
publication reads them. As in Megatron's buffers only storages are resized, so that every tensor and view
remains the same object. Megatron's `MegatronOptimizer.offload_to_cpu` replaces the optimizer's tensors
instead; in a float32 model these are the model's own weights, which an update would no longer reach.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

# Megatron's lists of float32 copies of 16-bit weights: of its distributed optimizer, and of the other one.
MASTERS = ("shard_fp32_from_float16_groups", "fp32_from_float16_groups")


class TrainerMemory:
    """Device memory of gradients and optimizer. Both methods do nothing if it is already so.

    On a CPU only the gradient buffers are freed: the optimizer is on the host already.
    """

    def __init__(self, wrapped: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
        self._wrapped, self._optimizer = wrapped, optimizer
        # Tensors of the optimizer and their copies on the host, which are reused.
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._is_offloaded = False

    @torch.no_grad()
    def offload(self) -> None:
        """Frees the device memory and returns it from torch's allocator to the device."""
        if self._is_offloaded:
            return
        hosts = {id(tensor): host for tensor, host in self._copies}
        self._copies = [
            (tensor, hosts[id(tensor)] if id(tensor) in hosts else _pinned_like(tensor))
            for tensor in _device_tensors(self._optimizer)
        ]
        for tensor, host in self._copies:
            host.copy_(tensor, non_blocking=True)
        for stage in self._wrapped:
            # Waits for the copies first.
            stage.offload_grad_buffers(empty_cache=False)
        for tensor, _host in self._copies:
            tensor.untyped_storage().resize_(0)
        torch.cuda.empty_cache()
        self._is_offloaded = True

    @torch.no_grad()
    def onload(self) -> None:
        """Allocates the memory again; gradients are zero, the optimizer's tensors as they were."""
        if not self._is_offloaded:
            return
        for tensor, host in self._copies:
            tensor.untyped_storage().resize_(host.nbytes)
            tensor.copy_(host, non_blocking=True)
        for stage in self._wrapped:
            stage.restore_grad_buffers()
        self._is_offloaded = False

    @contextmanager
    def offloaded_around(self, enabled: bool) -> Iterator[None]:
        """Offloads before the block, in which servers start, and after it: another model may be evaluated."""
        if enabled:
            self.offload()
        yield
        if enabled:
            self.offload()


def _device_tensors(optimizer: MegatronOptimizer) -> Iterator[Tensor]:
    """Yields moments and master weights on a GPU that share their storage with nothing else."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        masters = (group for name in MASTERS for group in getattr(part, name, ()))
        states = part.optimizer.state.values() if part.optimizer is not None else ()
        held = [*(tensor for group in masters for tensor in group), *(t for s in states for t in s.values())]
        for tensor in held:
            on_device = isinstance(tensor, Tensor) and tensor.is_cuda and tensor.dim() > 0
            if on_device and tensor.untyped_storage().nbytes() == tensor.nbytes:
                yield tensor


def _pinned_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu", pin_memory=True)
