"""Finds ranks that are slower than the others.

All ranks end a step together, for each waits for the slowest. What tells them apart is the time of their own
forward and backward passes, up to the reduction of the gradients. Ranks of one replica wait for each other
within a pass, so a slow one slows its whole replica.

Shapes: W ranks.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from statistics import median_low
from typing import Any

import torch

# A rank is slow in a step whose passes take it this many times as long as the median, and this much longer.
SLOW_RATIO = 1.5
SLOW_S = 0.2
# Slow steps in a row after which a warning names the rank.
SLOW_STEPS = 10
MAX_NAMED = 4


class PassTimer:
    """Times this rank's passes, on its device.

    On a GPU two events bracket a pass. They are read when the next step begins, long after the GPU has passed
    them: the host never waits.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._begun: Any = None  # seconds, or an event
        self._passes: list[tuple[Any, Any]] = []

    def begin(self) -> None:
        self._begun = self._mark()

    def end(self) -> None:
        """Ends the pass that `begin` has begun, if any."""
        if self._begun is not None:
            self._passes.append((self._begun, self._mark()))
            self._begun = None

    def take(self) -> float:
        """Seconds of all passes since the last call; one that the GPU has not finished is left out."""
        passes, self._passes = self._passes, []
        if self._on_gpu:
            return sum(begun.elapsed_time(ended) / 1000 for begun, ended in passes if ended.query())
        return sum(ended - begun for begun, ended in passes)

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class StragglerWatch:
    """Compares the ranks' seconds, step by step.

    Args:
        hosts: of the ranks, in their order.
    """

    def __init__(self, hosts: Sequence[str]) -> None:
        self._hosts = hosts
        self._slow_steps: Counter[int] = Counter()

    def metrics(self, seconds_W: Sequence[float]) -> dict[str, Any]:
        """The slowest rank of a step, the same on every rank; nothing before the first step."""
        slowest = max(range(len(seconds_W)), key=seconds_W.__getitem__)
        if not seconds_W[slowest]:
            return {}
        median = median_low(seconds_W)
        for rank, seconds in enumerate(seconds_W):
            is_slow = seconds > SLOW_RATIO * median and seconds > median + SLOW_S
            self._slow_steps[rank] = self._slow_steps[rank] + 1 if is_slow else 0
        return {
            "time_pass_max_s": seconds_W[slowest],
            "time_pass_median_s": median,
            "slowest_rank": slowest,
            "slowest_host": self._hosts[slowest],
        }

    def warning(self, metrics: dict[str, Any]) -> str | None:
        """Names the ranks whose last SLOW_STEPS steps were slow; once, while they stay so.

        Args:
            metrics: what `metrics` has just returned.
        """
        slow = [rank for rank, steps in self._slow_steps.items() if steps == SLOW_STEPS]
        if not slow or not metrics:
            return None
        names = [f"rank {rank} on {self._hosts[rank]}" for rank in slow[:MAX_NAMED]]
        more = [f"{len(slow) - MAX_NAMED} more"] if len(slow) > MAX_NAMED else []
        ratio = metrics["time_pass_max_s"] / max(metrics["time_pass_median_s"], 1e-9)
        return (
            f"{', '.join([*names, *more])}: slow in each of the last {SLOW_STEPS} steps, now {ratio:.1f} "
            "times the median of all ranks; look for other processes, a throttled GPU or a bad link there, "
            "or exclude the node"
        )
