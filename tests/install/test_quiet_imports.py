"""What torch says at import of a machine without a GPU does not stand before an error of ours."""

import os
import subprocess
import sys

import pytest

from megatron_parallel_r1.utils.exit import LOGGED

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
    first = "from megatron_parallel_r1.utils.exit import quiet_imports; quiet_imports()" if quiet else ""
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
    said = """
from megatron_parallel_r1.utils.exit import quiet_imports
quiet_imports()
import logging, warnings
logging.getLogger("torch.utils.cpp_extension").warning("your compiler is broken")
warnings.warn("your driver is on fire")
"""
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    assert "your compiler is broken" in done.stderr and "your driver is on fire" in done.stderr
