"""The kernels compile for Hopper: on its matrix units, within its shared memory, with no register spilled.

Triton brings NVIDIA's assembler, so no GPU is needed to know. What it does not tell is speed.
"""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.slow

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from megatron_parallel_r1.model.attention.kernels.forward import forward_kernel  # noqa: E402
from megatron_parallel_r1.model.attention.kernels.key_gradient import key_gradient_kernel  # noqa: E402
from megatron_parallel_r1.model.attention.kernels.query_gradient import query_gradient_kernel  # noqa: E402
from megatron_parallel_r1.model.attention.kernels.tilings import Tiling, tilings  # noqa: E402

KERNELS = {
    "forward": forward_kernel,
    "query_gradient": query_gradient_kernel,
    "key_gradient": key_gradient_kernel,
}
# CUDA's "maximum amount of shared memory per thread block" of compute capability 9.0.
SHARED_BYTES = 227 * 1024


def compiled(name: str, tiling: Tiling, dim: int) -> Any:
    """The kernel of bfloat16 tensors whose rows lie at multiples of 16 elements, as the model's do."""
    kernel = KERNELS[name]
    constants = {
        "SHARED": 4, "HEADS": 4, "LEVELS": 2, "BLOCK_M": tiling.queries, "BLOCK_N": tiling.keys,
        "BLOCK_D": dim, "EMULATED": False,
    }  # fmt: skip
    types = {"layout": "*i32", "tiles": "*i32", "whole_count": "*i32", "needed_count": "*i32"}
    types |= {"lse2": "*fp32", "delta": "*fp32", "scale": "fp32", "scale2": "fp32"}
    numbers = [name for name in kernel.arg_names if name.endswith(("_stride", "_head", "_split", "dim"))]
    types |= dict.fromkeys((*numbers, "queries", "keys"), "i32")
    aligned_numbers = set(numbers) - {"list_stride"}
    signature, fixed, aligned = {}, {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument], fixed[(index,)] = "constexpr", constants[argument]
        else:
            signature[argument] = types.get(argument, "*bf16")
        if signature[argument].startswith("*") or argument in aligned_numbers:
            aligned[(index,)] = [["tt.divisibility", 16]]
    options = {"num_warps": tiling.warps, "num_stages": tiling.stages}
    source = ASTSource(kernel, signature, fixed, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", list(KERNELS))
def test_compiles_for_hopper_without_spills(name: str, dim: int, tmp_path: Path) -> None:
    built = compiled(name, getattr(tilings(dim, torch.bfloat16), name), dim)
    assert "wgmma.mma_async" in built.asm["ptx"]
    assert built.metadata.shared <= SHARED_BYTES
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(built.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    (stack,) = re.findall(r"STACK:(\d+)", usage)
    assert int(stack) == 0, usage
