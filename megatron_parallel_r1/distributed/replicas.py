"""Splits a list over the model's replicas and gathers the results.

All ranks of a replica (a data-parallel rank) work on the same part; its first rank, the leader, reports it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_parallel_r1.distributed.collectives import all_gather_objects, barrier
from megatron_parallel_r1.errors import UserError

T = TypeVar("T")


def is_replica_leader() -> bool:
    """Returns whether this is the first rank of its replica, the one that reports results."""
    ranks = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_context_parallel_rank(),
    )
    return not any(ranks)


def replica_slice(items: Sequence[T]) -> Sequence[T]:
    """Returns this replica's part of `items`: consecutive ones, in nearly equal parts."""
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    return items[len(items) * rank // size : len(items) * (rank + 1) // size]


def gather_from_replicas(work: Callable[[], Sequence[T]], group: dist.ProcessGroup | None = None) -> list[T]:
    """Concatenates what the replicas compute, in their order, on every rank.

    Args:
        work: computes this replica's part, picklable; only the leaders' results are gathered.
        group: a group of all ranks to use instead of the default one.

    Raises:
        UserError: one rank raised it; every rank then raises it, so that none waits for another.
    """
    part: Sequence[T] = ()
    problem: UserError | None = None
    try:
        part = work()
    except UserError as error:
        problem = error
    # Among leaders, global ranks rise with the data-parallel rank.
    results = all_gather_objects((part if is_replica_leader() else (), problem), group)
    problems = [problem for _, problem in results if problem is not None]
    if problems:
        raise problems[0]
    return [item for part, _ in results for item in part]


@contextmanager
def background_groups(
    timeout_s: float, enabled: bool = True
) -> Iterator[tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]]:
    """Creates a second tensor-parallel group and a second world group (gloo), for use by another thread.

    Two threads that share a group could issue their collectives in a different order on each rank. Every rank
    must enter. The groups are destroyed on exit, but not after an error: that may wait for a lost rank.

    Args:
        timeout_s: time-out of their collectives.
        enabled: if not, creates none and yields None for both, which stand for the default groups.
    """
    if not enabled:
        yield None, None
        return
    own_ranks = dist.get_process_group_ranks(parallel_state.get_tensor_model_parallel_group())
    timeout = timedelta(seconds=timeout_s)
    # Every rank takes part in creating every group, in the same order.
    every = sorted({tuple(ranks) for ranks in all_gather_objects(own_ranks)})
    tensor = {ranks: dist.new_group(ranks, timeout) for ranks in every}
    world = dist.new_group(timeout=timeout, backend="gloo")
    yield tensor[tuple(own_ranks)], world
    barrier()
    for group in (*tensor.values(), world):
        dist.destroy_process_group(group)
