"""How many updates a trace is behind the weights that it trains.

Step s (from 1) trains weights of version s - 1. A trace counts by its oldest sampled token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from megatron_parallel_r1.thought.trace import Trace
from megatron_parallel_r1.train.rollouts import Collected


def staleness(trace: Trace, step: int) -> int:
    """Updates between the weights that drew it and those that `step` trains."""
    return step - 1 - trace.version


def stale_groups(traces: Sequence[Trace], step: int, most: int, size: int) -> list[bool]:
    """Of each group of `size` traces, whether one of them is more than `most` updates old."""
    old = [staleness(trace, step) > most for trace in traces]
    return [any(old[start : start + size]) for start in range(0, len(old), size)]


def without_stale(collected: Collected, step: int, most: int, size: int) -> Collected:
    """Keeps whole groups, and of those only the ones that are fresh enough.

    Raises:
        RuntimeError: not one is.
    """
    stale = stale_groups(collected.kept.traces, step, most, size)
    if not any(stale):
        return collected
    fresh = [group for group, is_stale in enumerate(stale) if not is_stale]
    if not fresh:
        raise RuntimeError(f"step {step}: all its {len(stale)} groups are more than {most} updates old")
    return replace(collected, kept=collected.kept.groups(fresh, size))


def staleness_metrics(traces: Sequence[Trace], step: int, most: int, size: int) -> dict[str, float]:
    """Mean and largest staleness of all traces of a step, in updates, and how many groups were too old."""
    ages = [staleness(trace, step) for trace in traces]
    return {
        "staleness": fmean(ages),
        "staleness_max": max(ages),
        "groups_stale": sum(stale_groups(traces, step, most, size)),
    }
