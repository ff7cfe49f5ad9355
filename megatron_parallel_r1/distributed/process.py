"""Starts and ends this rank: torch.distributed, Megatron's parallel groups, random states, watchdog."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_parallel_r1.distributed import cpu_backend
from megatron_parallel_r1.distributed.heartbeat import first_line
from megatron_parallel_r1.distributed.parallel_config import ParallelConfig, check_world
from megatron_parallel_r1.distributed.watchdog import Watchdog
from megatron_parallel_r1.errors import PeerLost, Stopped, UserError
from megatron_parallel_r1.utils.rank import rank, world_size


def start(
    seed: int,
    parallel: ParallelConfig | None = None,
    timeout_s: float = 1800,
    heartbeat_s: float = 60,
    join_s: float = 1800,
) -> Watchdog:
    """Connects the ranks of one launch (RANK, WORLD_SIZE; else a world of one) and creates the groups.

    Uses nccl and the local rank's GPU where CUDA is available, else gloo and the CPU. The ranks of a launch
    may start and stop several times: the n-th start of one meets the n-th start of every other.

    Args:
        seed: of Megatron's random states; the same on all ranks.
        timeout_s: time-out of a collective.
        heartbeat_s: silence of a rank after which every other one ends; at least 5.
        join_s: how long the ranks may take to connect.

    Returns:
        The watchdog, which ends this process once another is lost. Pass it to `stop`, or to `fail` after an
        error.

    Raises:
        UserError: the number of ranks is no multiple of `parallel.smallest_world`, or a node has more ranks
            than GPUs.
        PeerLost: a rank did not connect, or went away.
    """
    parallel = parallel or ParallelConfig()
    check_world(parallel, world_size())
    cpu_backend.patch_megatron()
    backend, timeout = "gloo", timedelta(seconds=timeout_s)
    if torch.cuda.is_available():
        backend = "nccl"
        local, visible = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", local + 1))
        if ranks > visible:
            raise UserError(
                f"this node has {ranks} ranks, and each sees {visible} GPUs; start fewer ranks, or if SLURM "
                "gives each its own GPU (--gpus-per-task, --gpu-bind), ask for --gpus-per-node instead"
            )
        torch.cuda.set_device(local)
    watchdog = Watchdog(rank(), world_size(), heartbeat_s)
    store: dist.Store = dist.HashStore()
    if world_size() > 1:
        # torchrun hosts a store of its own; under srun or by hand rank 0 does.
        hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        host = f"{'the launcher' if hosted else 'rank 0'}, which hosts the store,"
        store, watchdog_store = _connect(rank(), rank() == 0 and not hosted, host, join_s)
        watchdog.start(watchdog_store, host)
    try:
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank(), world_size=world_size())
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual if parallel.virtual > 1 else None,
            context_parallel_size=parallel.context,
            expert_model_parallel_size=parallel.expert,
            expert_tensor_parallel_size=parallel.expert_split,
            distributed_timeout_minutes=timeout_s / 60,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
    except BaseException as error:
        fail(watchdog, error)
        raise
    return watchdog


def stop(watchdog: Watchdog) -> None:
    """Destroys what `start` created; the host of the store leaves last."""
    _leave_groups()
    watchdog.close()


def fail(watchdog: Watchdog, error: BaseException) -> None:
    """Leaves after an error, and tells the other ranks why.

    With several ranks the groups are not destroyed: that may wait for a lost rank.

    Raises:
        PeerLost: `error` is a collective's; the message names the ranks that are missing or somewhere else.
    """
    if world_size() == 1:
        _leave_groups()
    if lost := watchdog.fail(error):
        raise lost from error


@contextmanager
def running(
    seed: int,
    parallel: ParallelConfig | None = None,
    timeout_s: float = 1800,
    heartbeat_s: float = 60,
    join_s: float = 1800,
) -> Iterator[Watchdog]:
    """`start` on entry; `stop` on exit, or `fail` after an error.

    The block reports this rank's location by `Watchdog.set_location`. `Stopped` is not an error: all ranks
    raise it together.
    """
    watchdog = start(seed, parallel, timeout_s, heartbeat_s, join_s)
    stopped: Stopped | None = None
    try:
        try:
            yield watchdog
        except Stopped as signal:
            stopped = signal
            if world_size() > 1:
                # A launcher may end all ranks with the first; each has closed its files by now.
                dist.barrier()
    except BaseException as error:
        fail(watchdog, error)
        raise
    stop(watchdog)
    if stopped:
        raise stopped


def _connect(own_rank: int, is_host: bool, host: str, join_s: float) -> tuple[dist.Store, dist.Store]:
    """Returns the store of this session and a second connection to it, once all ranks have both."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # A launcher that restarts its processes may keep its store, with what the lost ones wrote.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    timeout = timedelta(seconds=join_s)
    try:
        launch = _launch_store(address, port, world_size(), is_host, timeout)
        session = f"attempt{attempt}/session{launch.add(f'attempt{attempt}/starts/{own_rank}', 1)}"
        connections = (launch, launch.clone())  # type: ignore[attr-defined]  # torch's stubs lack it
        store, second = (dist.PrefixStore(session, connection) for connection in connections)
    except dist.DistError as error:
        reason = f"rank {own_rank}: {host} was not reached at {address}:{port} within {join_s:g} s"
        raise PeerLost(f"{reason} ({first_line(error)})") from error
    names = [f"joined/{other}" for other in range(world_size())]
    try:
        store.set(names[own_rank], "")
        store.wait(names, timeout)
    except dist.DistStoreError as error:
        missing = [other for other, name in enumerate(names) if not store.check([name])]
        raise PeerLost(f"rank {own_rank}: {_ranks(missing)} did not connect within {join_s:g} s") from error
    except dist.DistNetworkError as error:
        raise PeerLost(f"rank {own_rank}: {host} went away before all ranks had connected") from error
    return store, second


@cache
def _launch_store(address: str, port: int, size: int, is_host: bool, timeout: timedelta) -> dist.TCPStore:
    """Hosts the launch's store or connects to it, once a process.

    It outlives its sessions: a rank that is early for the next one waits in the store, and would be lost if
    the host closed it between two sessions.
    """
    return dist.TCPStore(
        address, port, size, is_master=is_host, timeout=timeout, wait_for_workers=False, multi_tenant=True
    )


def _ranks(ranks: list[int]) -> str:
    return f"{len(ranks)} ranks, rank {ranks[0]} first," if len(ranks) > 1 else f"rank {ranks[0]}"


def _leave_groups() -> None:
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
