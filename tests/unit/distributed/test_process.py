"""A world of one starts and stops, and the CPU backend patches nothing but Megatron."""

import os
import threading

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules

from megatron_parallel_r1.distributed import cpu_backend, process
from megatron_parallel_r1.distributed.parallel_config import ParallelConfig
from megatron_parallel_r1.errors import PeerLost, UserError
from megatron_parallel_r1.rollout.launcher.ports import free_port

needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="on CUDA nothing is redirected")


def test_a_world_of_one_can_be_left_and_joined_again() -> None:
    assert "RANK" not in os.environ
    for _ in range(2):
        with process.running(seed=1):
            assert dist.get_world_size() == parallel_state.get_tensor_model_parallel_world_size() == 1
        assert not dist.is_initialized() and not parallel_state.model_parallel_is_initialized()


def test_on_a_gpu_nothing_is_redirected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "torch", torch)  # as before any patch
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cuda = {name: getattr(torch.cuda, name) for name in ("current_device", "synchronize", "manual_seed")}
    tensor = (torch.Tensor.cuda, torch.Tensor.type)
    cpu_backend.patch_megatron()
    assert schedules.torch is torch and (torch.Tensor.cuda, torch.Tensor.type) == tensor
    assert all(getattr(torch.cuda, name) is kept for name, kept in cuda.items())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cpu_backend.patch_megatron()
    assert schedules.torch is not torch


def test_too_few_processes_are_named() -> None:
    with pytest.raises(UserError, match="= 4 does not divide the 1 processes"):
        process.start(seed=1, parallel=ParallelConfig(tensor=2, pipeline=2))
    assert not dist.is_initialized()


def test_ranks_without_a_gpu_of_their_own_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"4 ranks, and each sees 1 GPUs; .* ask for --gpus-per-node"):
        process.start(seed=1)
    assert not dist.is_initialized()


def test_the_launch_is_checked_before_the_processes_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "6")  # and no MASTER_ADDR: nothing could connect
    with pytest.raises(UserError, match="= 4 does not divide the 6 processes; start a multiple of 4"):
        process.start(seed=1, parallel=ParallelConfig(tensor=2, pipeline=2))
    assert not dist.is_initialized()


def test_a_rank_that_waits_in_vain_names_the_missing_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    world = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in world.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PeerLost, match="rank 0: 2 ranks, rank 1 first, did not connect within 0"):
        process.start(seed=1, join_s=0.5)
    assert not dist.is_initialized()


def test_a_world_of_one_has_no_watchdog_thread_and_keeps_its_errors() -> None:
    threads = threading.active_count()
    with pytest.raises(RuntimeError, match="its own"), process.running(seed=1) as watchdog:
        watchdog.set_location("stage rl, step 1")
        assert threading.active_count() == threads
        raise RuntimeError("its own, [/x/gloo/y.cc] and what it may say")
    assert not dist.is_initialized()


@needs_no_cuda
def test_only_megatron_takes_the_cpu_for_cuda() -> None:
    with process.running(seed=1):
        from megatron.core.pipeline_parallel import schedules

        assert schedules.torch.zeros(2, device="cuda").device.type == "cpu"
        with pytest.raises((AssertionError, RuntimeError)):
            torch.zeros(2, device="cuda")
        assert not torch.overrides._get_current_function_mode_stack()
