"""Imports on a machine without a GPU: no message before an error of ours, nothing that a CPU does not use."""

import os
import subprocess
import sys

import pytest

from megatron_parallel_r1.utils.imports import LOGGED

# A CUDA build of torch where nvcc is and no driver, whatever build this is.
CUDA_BUILD = """
import torch
torch.version.cuda = "13.0"
torch.cuda._is_compiled = lambda: True
torch.cuda.is_available = lambda: False
import torch.utils.cpp_extension
"""


@pytest.mark.parametrize("quiet", [False, True])
def test_cuda_build_without_driver(quiet: bool) -> None:
    first = (
        "from megatron_parallel_r1.utils.imports import prepare_imports; prepare_imports()" if quiet else ""
    )
    done = subprocess.run(
        [sys.executable, "-c", first + CUDA_BUILD],
        env={**os.environ, "CUDA_HOME": "/opt/cuda"},
        capture_output=True,
        text=True,
        check=True,
    )
    if quiet:
        assert done.stderr == ""
    else:  # else the name in LOGGED is of the past
        assert LOGGED["torch.utils.cpp_extension"] in done.stderr


def test_all_else_is_heard() -> None:
    script = """
from megatron_parallel_r1.utils.imports import prepare_imports
prepare_imports()
import logging, warnings
logging.getLogger("torch.utils.cpp_extension").warning("your compiler is broken")
warnings.warn("your driver is on fire")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "your compiler is broken" in done.stderr and "your driver is on fire" in done.stderr


def test_a_cpu_loads_neither_the_compiler_nor_wandb() -> None:
    code = """
from megatron_parallel_r1.utils.imports import prepare_imports
prepare_imports()
import sys
import torch
compile_function = torch.compile
import megatron_parallel_r1.curriculum.run
if not torch.cuda.is_available():
    heavy = {"torch._dynamo", "torch._inductor", "wandb", "matplotlib"} & set(sys.modules)
    assert not heavy, heavy
assert torch.compile is compile_function
import wandb, megatron.core.timers
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
