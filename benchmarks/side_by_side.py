"""Ours and the alternative in one run: calls that take turns, and their medians with spread.

The machines are noisy, so nothing is compared across runs. In each repeat every call is made once, in an
order that rotates; a ratio is taken within each repeat, and its median is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median

Measure = Callable[[], float]  # does the work once; what it returns is compared: a rate, or seconds


def alternate(calls: Mapping[str, Measure], repeats: int) -> dict[str, list[float]]:
    """What each call returned in each repeat; one more repeat goes before them, warms up, and is left out."""
    names = list(calls)
    found: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats + 1):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            value = calls[name]()
            if repeat:
                found[name].append(value)
    return found


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Of the two in each repeat."""
    return [one / other for one, other in zip(ours, theirs, strict=True)]


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """`median (lowest to highest)`."""
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"
