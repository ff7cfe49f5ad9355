"""Times the phases of a step, and computes its rates."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class Timers:
    """Sums the seconds of one thread by name until they are taken."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Adds the time of the block, even if it raises."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.monotonic() - began

    def take(self) -> dict[str, float]:
        """Returns all sums as metrics `time_NAME_s` and resets them."""
        taken, self._seconds = self._seconds, {}
        return {f"time_{name}_s": seconds for name, seconds in taken.items()}


def throughput(record: Mapping[str, Any]) -> dict[str, float]:
    """Tokens per second of a step, of all replicas; without a rate whose tokens or seconds are not recorded.

    Returns:
        `rollout_tokens_per_second`: tokens of the step's traces by the seconds of their sampling.
        `training_tokens_per_second`: trained targets (SFT: tokens of the rows) by the seconds of training.
    """
    rates = {"rollout": ("tokens", "time_draw_s"), "training": ("tokens_trained", "time_train_s")}
    if record.get("kind") == "sft":
        rates = {"training": ("tokens", "time_s")}
    return {
        f"{name}_tokens_per_second": record[tokens] / record[seconds]
        for name, (tokens, seconds) in rates.items()
        if record.get(tokens) is not None and record.get(seconds)
    }
