"""Copies from the host to a device, and the settings of CUDA's allocator."""

from __future__ import annotations

import os
import resource
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def to_device(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Copies to a device, from pinned memory to a GPU, so that the host does not wait for the GPU.

    The allocator of pinned memory reuses a block only after the copies from it have ended.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def peak_memory_gb() -> float:
    """The most memory that this process has held at once, in GB: of its GPU, without one of the host."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


def keep_memory_shareable() -> None:
    """Turns expandable segments of CUDA's allocator off, if the environment turns them on.

    torch shares such memory by file descriptors, which another process may take only where it may trace this
    one (pidfd_getfd(2)): neither in most containers nor from a parent. To be called before the first
    allocation.
    """
    # The order in which torch reads them (c10/cuda/CUDAAllocatorConfig.h).
    settings = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", os.environ.get("PYTORCH_ALLOC_CONF", ""))
    if "expandable_segments:True" in settings:
        fixed = settings.replace("expandable_segments:True", "expandable_segments:False")
        torch._C._accelerator_setAllocatorSettings(fixed)
