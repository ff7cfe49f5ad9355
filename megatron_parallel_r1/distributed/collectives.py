"""What one process finds out and all must know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state

T = TypeVar("T")


def told_all(mine: T, world: dist.ProcessGroup | None = None) -> list[T]:
    """What each process has to say (picklable), in the order of ranks, on every process.

    Args:
        world: all processes, if not by the default group.
    """
    if dist.get_world_size() == 1:
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine, group=world)
    return everyone


def told_first(mine: T) -> list[T]:
    """As `told_all`, on the first process; an empty list on the others."""
    if dist.get_world_size() == 1:
        return [mine]
    everyone: list[T] | None = [mine] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, everyone)
    return everyone or []


def first_does(work: Callable[[], T]) -> T:
    """The first process does it; all return its result (picklable) or raise its error."""
    outcome: list[tuple[Any, Exception | None]] = [(None, None)]
    if dist.get_rank() == 0:
        try:
            outcome = [(work(), None)]
        except Exception as error:  # whatever it is, the others would wait for it
            outcome = [(None, error)]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(outcome, src=0)
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


def all_agree(mine: bool, device: torch.device) -> bool:
    """Whether it is so on every process; one number travels."""
    if dist.get_world_size() == 1:
        return mine
    flag = torch.tensor(float(mine), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())


def wait_for_all() -> None:
    """Returns when every process has come here: what one has written, all can read then."""
    if dist.get_world_size() > 1:
        dist.barrier()


def total(reports: Sequence[dict[str, torch.Tensor]], device: torch.device) -> dict[str, float]:
    """Sums scalars of the same names over micro-batches and over data- and context-parallel processes.

    Args:
        reports: of this process's micro-batches; empty on all but the last pipeline stage, which tells the
            others.
    """
    names: list[str] = sorted(reports[0]) if reports else []
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    if pipeline.size() > 1:
        told = [names]
        dist.broadcast_object_list(told, last, group=pipeline)
        names = told[0]
    sums = torch.zeros(len(names), dtype=torch.float64, device=device)
    for report in reports:
        sums += torch.stack([report[name].double() for name in names])
    if reports:
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    if pipeline.size() > 1:
        dist.broadcast(sums, last, group=pipeline)
    return dict(zip(names, sums.tolist(), strict=True))


def highest(value: float, device: torch.device) -> float:
    """The largest of all processes' values."""
    most = torch.tensor(value, dtype=torch.float64, device=device)
    if dist.get_world_size() > 1:
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return most.item()
