"""Alternating measurements of ours and an alternative in one run, with medians and spread.

Machines are noisy, so nothing is compared across runs. Each repeat makes every call once, in rotating order;
ratios are taken within each repeat, and their median is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median

Measure = Callable[[], float]  # does the work once; returns the compared quantity: a rate or seconds


def alternate(calls: Mapping[str, Measure], repeats: int) -> dict[str, list[float]]:
    """Returns each call's results in `repeats` repeats, after one warm-up repeat."""
    names = list(calls)
    results: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats + 1):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            value = calls[name]()
            if repeat:
                results[name].append(value)
    return results


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Ours / theirs in each repeat."""
    return [our / their for our, their in zip(ours, theirs, strict=True)]


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Formats `median (lowest to highest)`."""
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"
