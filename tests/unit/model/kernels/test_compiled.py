"""The kernels compile for GPUs: on their matrix units, within their shared memory, with no register spilled.

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

from megatron_parallel_r1.model.attention.triton_kernels import (  # noqa: E402
    forward_kernel,
    key_gradient_kernel,
    query_gradient_kernel,
)
from megatron_parallel_r1.model.attention.triton_tilings import HOPPER_SHARED_BYTES, Tiling, tilings  # noqa: E402

KERNELS = {
    "forward": forward_kernel,
    "query_gradient": query_gradient_kernel,
    "key_gradient": key_gradient_kernel,
}
# CUDA's "maximum amount of shared memory per thread block" by compute capability: Hopper, and Ada, which has
# least of those that have bfloat16.
SHARED_BYTES = {90: 227 * 1024, 89: 99 * 1024}
# Triton 3.7, which torch 2.13 requires, spills this one; 3.9 does not. [bytes]
SPILLED = {("3.7", 89, "key_gradient", 128): 24}
INSTRUCTION = {90: "wgmma.mma_async", 89: "mma.sync"}
# Those that take most, and all of the widths whose tiles are alike nowhere else.
CASES = [
    *((90, name, dim) for dim in (128, 256) for name in KERNELS),
    *((90, "key_gradient", 64), (89, "query_gradient", 128), (89, "key_gradient", 128)),
    (89, "key_gradient", 256),
]


def compiled(name: str, tiling: Tiling, dim: int, capability: int) -> Any:
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
    options = {"num_warps": tiling.warps, "num_stages": tiling.stages, "enable_fp_fusion": True}
    source = ASTSource(kernel, signature, fixed, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize(("capability", "name", "dim"), CASES)
def test_compiles_without_spills(capability: int, name: str, dim: int, tmp_path: Path) -> None:
    shared = SHARED_BYTES[capability]
    built = compiled(name, getattr(tilings(dim, torch.bfloat16, shared), name), dim, capability)
    # Half as many keys as a group of warps of Hopper multiplies at once: wider would spill.
    narrow = (capability, name, dim) == (90, "key_gradient", 256)
    assert INSTRUCTION[89 if narrow else capability] in built.asm["ptx"]
    assert built.metadata.shared <= min(shared, HOPPER_SHARED_BYTES)
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(built.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    (stack,) = re.findall(r"STACK:(\d+)", usage)
    release = ".".join(triton.__version__.split(".")[:2])
    assert int(stack) == SPILLED.get((release, capability, name, dim), 0), usage
