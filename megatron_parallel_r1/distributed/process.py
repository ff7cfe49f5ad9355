"""This process's place among all: torch.distributed, Megatron's parallel groups, random states."""

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
from megatron_parallel_r1.distributed.parallel_config import Parallel, check_world
from megatron_parallel_r1.distributed.watchdog import Watch
from megatron_parallel_r1.errors import PeerLost, Stopped


def world_size() -> int:
    """Processes that were launched together; known before they have met."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else 1


def is_first() -> bool:
    """Whether this process writes the run's files and speaks to the user."""
    return world_size() == 1 or os.environ["RANK"] == "0"


def start(
    seed: int,
    parallel: Parallel | None = None,
    timeout_s: float = 1800,
    heartbeat_s: float = 60,
    join_s: float = 1800,
) -> Watch:
    """Joins the processes of one launch (RANK, WORLD_SIZE), or becomes a world of one, and splits it.

    Uses nccl and the local rank's GPU where CUDA is available, else gloo and the CPU. The processes of a
    launch may come together and part several times: the n-th start of one meets the n-th of every other.

    Args:
        seed: of Megatron's random states; the same on all processes.
        parallel: sizes of the model-parallel groups; None for one process a copy.
        timeout_s: how long a collective may wait for the others.
        heartbeat_s: how long a rank may be silent before every other one ends; at least 5.
        join_s: how long the processes may take to come together.

    Returns:
        What ends this process once another is gone. To be given to `stop`, or to `fail` after an error.

    Raises:
        UserError: the number of processes is no multiple of tensor x pipeline x context.
        PeerLost: a process did not come, or went away.
    """
    parallel = parallel or Parallel()
    check_world(parallel, world_size())
    cpu_backend.bring_up()
    backend, timeout = "gloo", timedelta(seconds=timeout_s)
    if torch.cuda.is_available():
        backend = "nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    rank = int(os.environ["RANK"]) if world_size() > 1 else 0
    watch = Watch(rank, world_size(), heartbeat_s)
    store = dist.HashStore()
    if world_size() > 1:
        # torchrun keeps a store of its own; under srun or by hand rank 0 does.
        hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        host = f"{'the launcher' if hosted else 'rank 0'}, which hosts the store,"
        store, own = _meet(rank, rank == 0 and not hosted, host, join_s)
        watch.begin(own, host)
    try:
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size())
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual if parallel.virtual > 1 else None,
            context_parallel_size=parallel.context,
            distributed_timeout_minutes=timeout_s / 60,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
    except BaseException as error:
        fail(watch, error)
        raise
    return watch


def stop(watch: Watch) -> None:
    """Leaves the world that `start` joined; the host of the store leaves it last."""
    _leave_groups()
    watch.close()


def fail(watch: Watch, error: BaseException) -> None:
    """Leaves the world after an error, and tells the other processes why.

    Among several processes the groups are left as they are: to leave them may wait for a lost process.

    Raises:
        PeerLost: `error` is that of a collective; it names who is missing, or who is somewhere else.
    """
    if world_size() == 1:
        _leave_groups()
    if lost := watch.fail(error):
        raise lost from error


@contextmanager
def running(
    seed: int,
    parallel: Parallel | None = None,
    timeout_s: float = 1800,
    heartbeat_s: float = 60,
    join_s: float = 1800,
) -> Iterator[Watch]:
    """`start` on entry; on exit `stop`, or `fail` after an error. Say where the process is by `Watch.at`.

    `Stopped` is no error: all processes raise it together.
    """
    watch = start(seed, parallel, timeout_s, heartbeat_s, join_s)
    stopped: Stopped | None = None
    try:
        try:
            yield watch
        except Stopped as asked:
            stopped = asked
            if world_size() > 1:
                # A launcher may end all with the first; what all had to close is closed now.
                dist.barrier()
    except BaseException as error:
        fail(watch, error)
        raise
    stop(watch)
    if stopped:
        raise stopped


def _meet(rank: int, hosts: bool, host: str, join_s: float) -> tuple[dist.Store, dist.Store]:
    """What all processes share in this session, and a second connection to it, once all of them have both."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # A launcher that starts its processes anew may keep its store, with what the lost ones wrote.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    patience = timedelta(seconds=join_s)
    try:
        whole = _connection(address, port, world_size(), hosts, patience)
        session = f"attempt{attempt}/session{whole.add(f'attempt{attempt}/starts/{rank}', 1)}"
        store, own = (dist.PrefixStore(session, one) for one in (whole, whole.clone()))
    except dist.DistError as error:
        where = f"rank {rank}: {host} was not reached at {address}:{port} within {join_s:g} s"
        raise PeerLost(f"{where} ({first_line(error)})") from error
    names = [f"joined/{other}" for other in range(world_size())]
    try:
        store.set(names[rank], "")
        store.wait(names, patience)
    except dist.DistStoreError as error:
        missing = [other for other, name in enumerate(names) if not store.check([name])]
        raise PeerLost(f"rank {rank}: {_ranks(missing)} did not come within {join_s:g} s") from error
    except dist.DistNetworkError as error:
        raise PeerLost(f"rank {rank}: {host} went away before all had come") from error
    return store, own


@cache
def _connection(address: str, port: int, world: int, hosts: bool, patience: timedelta) -> dist.TCPStore:
    """The launch's store, hosted or reached; it outlives its sessions.

    Kept for as long as the process lives: whoever is early for the next session waits in the store, and
    would be lost with it if its host let go of it between two sessions.
    """
    return dist.TCPStore(
        address,
        port,
        world,
        is_master=hosts,
        timeout=patience,
        wait_for_workers=False,
        multi_tenant=True,
    )


def _ranks(ranks: list[int]) -> str:
    return f"{len(ranks)} ranks, rank {ranks[0]} first," if len(ranks) > 1 else f"rank {ranks[0]}"


def _leave_groups() -> None:
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
