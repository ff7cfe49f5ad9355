"""A world of one comes and goes, and the CPU bring-up stays inside Megatron."""

import os

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.model import process
from megatron_parallel_r1.model.process import Parallel

needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="on CUDA nothing is redirected")


def test_a_world_of_one_can_be_left_and_joined_again() -> None:
    assert "RANK" not in os.environ
    for _ in range(2):
        with process.running(seed=1):
            assert dist.get_world_size() == parallel_state.get_tensor_model_parallel_world_size() == 1
        assert not dist.is_initialized() and not parallel_state.model_parallel_is_initialized()


def test_too_few_processes_are_named() -> None:
    with pytest.raises(UserError, match="= 4 does not divide the 1 processes"):
        process.start(seed=1, parallel=Parallel(tensor=2, pipeline=2))
    assert not dist.is_initialized()


@needs_no_cuda
def test_only_megatron_takes_the_cpu_for_cuda() -> None:
    with process.running(seed=1):
        from megatron.core.pipeline_parallel import schedules

        assert schedules.torch.zeros(2, device="cuda").device.type == "cpu"
        with pytest.raises((AssertionError, RuntimeError)):
            torch.zeros(2, device="cuda")
        assert not torch.overrides._get_current_function_mode_stack()
