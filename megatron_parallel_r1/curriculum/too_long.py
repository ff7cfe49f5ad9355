"""What a recipe holds too long to be trained on is left out of a data set, and counted."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

from megatron_parallel_r1.data.problems import Example, Problem
from megatron_parallel_r1.data.readers import Reading
from megatron_parallel_r1.data.source import Streamed, problem_of
from megatron_parallel_r1.errors import UserError

T = TypeVar("T", Problem, Example)


def without_long(
    items: Reading[T] | Streamed[T], tokens: Callable[[T], int], most: int, stage: str, setting: str
) -> Reading[T] | Streamed[T]:
    """The items of at most so many tokens; goes through all of them once.

    Args:
        stage, setting: whose they are and what sets `most`, for messages.

    Raises:
        UserError: all are longer.
    """
    # It brings Megatron, which a command that only reads need not wait for.
    from megatron_parallel_r1.model import process

    count, longer = 0, set()
    for item in items.in_order():
        count += 1
        if tokens(item) > most:
            longer.add(problem_of(item).id)
    if len(longer) == count:
        raise UserError(f"stage {stage}: nothing of its data has at most {most:,} tokens; raise {setting}")
    if longer and process.is_first():
        left_out = f"{len(longer)} of {count} have more than {most:,} tokens ({setting}), left out"
        print(f"stage {stage}: {left_out}", file=sys.stderr)
    return items.without(longer)
