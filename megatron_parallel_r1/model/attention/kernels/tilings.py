"""How many queries and keys a program takes at once, and with how many warps and stages.

Starting values. Those of bfloat16 compile without spilling registers, for Hopper (227 KiB of shared memory a
program, 64 K registers a multiprocessor) and for GPUs that have less of the first:
tests/unit/model/kernels/test_compiled.py. `benchmarks/gpu/run.py --tune` measures others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# What the tiles for Hopper need, in bytes; those for data centers have it, those for graphics do not.
ROOMY = 161 * 1024


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


def tilings(dim: int, dtype: torch.dtype, shared: int = ROOMY) -> Tilings:
    """Tiles that fit.

    Args:
        dim: of a head, up to 256.
        shared: bytes of memory that a program may have of a multiprocessor.
    """
    if dtype == torch.float32:  # On the cores that round like float32: no tensor core does.
        return Tilings(Tiling(32, 16, 8, 2), Tiling(32, 16, 8, 2), Tiling(16, 32, 8, 2))
    if shared < ROOMY and dim <= 128:
        return Tilings(Tiling(64, 32, 4, 2), Tiling(64, 32, 4, 2), Tiling(32, 32, 4, 2))
    if shared < ROOMY:
        return Tilings(Tiling(32, 32, 4, 1), Tiling(32, 32, 4, 1), Tiling(32, 32, 8, 1))
    if dim <= 64:
        return Tilings(Tiling(128, 64, 8, 3), Tiling(128, 64, 8, 3), Tiling(64, 128, 8, 3))
    if dim <= 128:
        return Tilings(Tiling(128, 64, 8, 3), Tiling(128, 64, 8, 3), Tiling(32, 128, 8, 3))
    return Tilings(Tiling(64, 32, 8, 2), Tiling(64, 32, 8, 2), Tiling(32, 32, 8, 2))
