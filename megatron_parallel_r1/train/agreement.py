"""What one process finds out and all must know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

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
