"""Times other tile sizes of the Triton kernels, one kernel at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import torch

from benchmarks.gpu.clock import cost_of
from benchmarks.gpu.rows import timed_rows
from benchmarks.gpu.sizes import Sizes
from benchmarks.page import Table
from megatron_parallel_r1.model.attention.triton_tilings import Tiling, Tilings, tilings


def candidates(sizes: Sizes) -> Iterator[tuple[str, Tilings]]:
    """The current tiles, and all variants of one kernel's tiles."""
    present = tilings(sizes.dim, torch.bfloat16)
    yield "present", present
    for kernel in ("forward", "query_gradient", "key_gradient"):
        for queries, keys, warps, stages in product((32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
            tiling = Tiling(queries, keys, warps, stages)
            if tiling != getattr(present, kernel):
                yield kernel, replace(present, **{kernel: tiling})


def table(sizes: Sizes, device: torch.device) -> Table:
    """The ten fastest tilings of each kernel, forward + backward, on the row of middle length."""
    # Triton is not available on every machine.
    from megatron_parallel_r1.model.attention.triton_attention import kernel_attention

    packed = timed_rows(sizes.lengths[len(sizes.lengths) // 2])["isolated"]
    layout_KL = torch.from_numpy(packed.layout_KL).to(device)
    heads = (sizes.heads, sizes.groups, sizes.groups)
    leaves = [
        torch.randn(len(packed), h, sizes.dim, device=device, dtype=torch.bfloat16, requires_grad=True)
        for h in heads
    ]
    grad_LHD = torch.randn_like(leaves[0])
    results: dict[str, list[tuple[float, str]]] = {}
    for kernel, chosen in candidates(sizes):

        def both(chosen: Tilings = chosen) -> None:
            out_LHD, _ = kernel_attention(*leaves, layout_KL, sizes.dim**-0.5, chosen)
            torch.autograd.grad(out_LHD, leaves, grad_LHD)

        tiles = str(chosen if kernel == "present" else getattr(chosen, kernel))
        try:
            results.setdefault(kernel, []).append((cost_of(both, device, sizes.repeats).ms, tiles))
        except Exception as error:  # tiles exceed shared memory; an exception type of Triton
            print(f"{kernel} {tiles}: {str(error).splitlines()[0]}")
    rows = [[kernel, tiles, f"{ms:.2f}"] for kernel in results for ms, tiles in sorted(results[kernel])[:10]]
    return Table("Forward and backward by tile sizes", ("kernel", "tiles", "ms"), rows)
