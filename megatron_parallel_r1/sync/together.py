"""Work of the first process whose result, or error, all processes get."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def first_does(work: Callable[[], T]) -> T:
    """Its result (picklable) or its error, on every process of the world; all must call it."""
    told: list[tuple[Any, Exception | None]] = [(None, None)]
    if dist.get_rank() == 0:
        try:
            told = [(work(), None)]
        except Exception as error:  # whatever it is, the others wait to hear of it
            told = [(None, error)]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(told, src=0)
    result, error = told[0]
    if error is not None:
        raise error
    return result
