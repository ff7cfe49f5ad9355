"""Which of the sampled traces a data set keeps."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from megatron_parallel_r1.utils.settings import Count, Settings, Unit


class Check(Settings):
    """Conditions under which a well-formed trace with a right answer is kept."""

    parallel: bool = True
    """Require a block; false for sequential traces, and for adaptive ones, which may do without."""
    independent: bool = True
    """Refuse paths that mention a sibling (`checks.py`)."""
    max_chars: Annotated[int, Field(ge=1), Unit("characters")] = 20_000
    """Longest trace."""


class Balance(Settings):
    """Balancing of the kept traces (`balance.py`)."""

    per_problem: Count = 1
    """Most traces of one problem."""
    ratio: Annotated[float, Field(ge=1)] | None = None
    """Most traces of one shape (blocks of a trace, paths of its widest block), as a multiple of the mean over
    the shapes that occur; 1 makes all equal, null keeps all."""
