"""How many queries and keys a program takes at once, and with how many warps and stages.

Starting values for Hopper (228 KiB of shared memory, 64 K registers a multiprocessor): the largest tiles that
compile for it without spilling registers (tests/unit/model/kernels/test_hopper.py holds them to that).
`benchmarks/gpu/run.py --tune` measures others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Tiling:
    """A program's tile: `queries` by `keys`; `stages` loads are under way at once."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Tilings:
    """One for each kernel."""

    forward: Tiling
    query_gradient: Tiling
    key_gradient: Tiling


def tilings(dim: int, dtype: torch.dtype) -> Tilings:
    """For a head dimension of up to 256."""
    if dtype == torch.float32:  # On the cores that round like float32: no tensor core does.
        return Tilings(Tiling(32, 16, 8, 2), Tiling(32, 16, 8, 2), Tiling(16, 32, 8, 2))
    if dim <= 64:
        return Tilings(Tiling(128, 64, 8, 3), Tiling(128, 64, 8, 3), Tiling(64, 128, 8, 3))
    if dim <= 128:
        return Tilings(Tiling(128, 64, 8, 3), Tiling(128, 64, 8, 3), Tiling(32, 128, 8, 3))
    return Tilings(Tiling(64, 32, 8, 2), Tiling(64, 32, 8, 2), Tiling(32, 64, 8, 2))
