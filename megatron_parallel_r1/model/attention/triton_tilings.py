"""Tile sizes, warps and stages of the kernels.

Initial values. Those for bfloat16 compile without spilling registers, for Hopper (227 KiB of shared memory a
program, 64 K registers a multiprocessor) and for GPUs with less shared memory:
tests/unit/model/kernels/test_compiled.py. `benchmarks/gpu/run.py --tune` measures others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Shared memory in bytes that the Hopper tiles need; data-center GPUs have it, graphics cards do not.
HOPPER_SHARED_BYTES = 161 * 1024


@dataclass(frozen=True, slots=True)
class Tiling:
    """A program's tile: `queries` by `keys`; `stages` loads are in flight at once."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Tilings:
    """The tiling of each kernel."""

    forward: Tiling
    query_gradient: Tiling
    key_gradient: Tiling


def tilings(dim: int, dtype: torch.dtype, shared: int = HOPPER_SHARED_BYTES) -> Tilings:
    """Returns tilings that fit.

    Args:
        dim: of a head, up to 256.
        shared: bytes of a multiprocessor's shared memory that a program may use.
    """
    if dtype == torch.float32:  # on CUDA cores: no tensor core rounds like float32
        return Tilings(Tiling(32, 16, 8, 2), Tiling(32, 16, 8, 2), Tiling(16, 32, 8, 2))
    if shared < HOPPER_SHARED_BYTES and dim <= 128:
        return Tilings(Tiling(64, 32, 4, 2), Tiling(64, 32, 4, 2), Tiling(32, 32, 4, 2))
    if shared < HOPPER_SHARED_BYTES:
        return Tilings(Tiling(32, 32, 4, 1), Tiling(32, 32, 4, 1), Tiling(32, 32, 8, 1))
    if dim <= 64:
        return Tilings(Tiling(128, 64, 8, 3), Tiling(128, 64, 8, 3), Tiling(64, 128, 8, 3))
    if dim <= 128:
        return Tilings(Tiling(128, 64, 8, 3), Tiling(128, 64, 8, 3), Tiling(32, 128, 8, 3))
    return Tilings(Tiling(64, 32, 8, 2), Tiling(64, 32, 8, 2), Tiling(32, 32, 8, 2))
