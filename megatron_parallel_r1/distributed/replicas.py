"""Work that the copies of a model share: which part of a list is this process's, and all parts together.

A copy of the model (a data-parallel rank) works on its part as one; its first process speaks for it.

A second thread needs groups of its own (`second_groups`): collectives of two threads on one group would meet
in another order on each process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_parallel_r1.distributed.collectives import told_all, wait_for_all
from megatron_parallel_r1.errors import UserError

T = TypeVar("T")


def speaks() -> bool:
    """Whether this process speaks for its copy of the model."""
    others = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_context_parallel_rank(),
    )
    return not any(others)


def share(items: Sequence[T]) -> Sequence[T]:
    """The part of `items` that this process's copy works on: neighbours, in nearly equal parts."""
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    return items[len(items) * rank // size : len(items) * (rank + 1) // size]


def gathered(work: Callable[[], Sequence[T]], world: dist.ProcessGroup | None = None) -> list[T]:
    """What the copies make of their shares, in the order of the whole, on every process.

    Args:
        work: makes this process's part, picklable; only that of a process that `speaks` counts.
        world: all processes, if not by the default group.

    Raises:
        UserError: one of the processes met it; all raise it, so that none waits for another.
    """
    part: Sequence[T] = ()
    problem: UserError | None = None
    try:
        part = work()
    except UserError as error:
        problem = error
    # Ranks rise with the data-parallel rank among the processes that speak.
    told = told_all((part if speaks() else (), problem), world)
    problems = [problem for _, problem in told if problem is not None]
    if problems:
        raise problems[0]
    return [item for part, _ in told for item in part]


@contextmanager
def second_groups(timeout_s: float) -> Iterator[tuple[dist.ProcessGroup, dist.ProcessGroup]]:
    """This process's tensor group and, over the CPU, the world, each once more; all processes call it.

    They are gone on exit, unless by an error: to leave a group may wait for a lost process.

    Args:
        timeout_s: how long one of their collectives may wait.
    """
    mine = dist.get_process_group_ranks(parallel_state.get_tensor_model_parallel_group())
    timeout = timedelta(seconds=timeout_s)
    # Every process takes part in the making of every group, in one order.
    tensor = {
        ranks: dist.new_group(ranks, timeout) for ranks in sorted({tuple(ranks) for ranks in told_all(mine)})
    }
    world = dist.new_group(timeout=timeout, backend="gloo")
    yield tensor[tuple(mine)], world
    wait_for_all()
    for group in (*tensor.values(), world):
        dist.destroy_process_group(group)
