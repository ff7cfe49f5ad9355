"""Times the phases of a step."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Timers:
    """Sums seconds by name until they are taken; all threads add to the same sums.

    With a rollout thread, the phases of a step overlap: they sum to more than its time, and rollout phases
    are those of the batch that was under way.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Adds the time of the block, even if it raises."""
        began = time.monotonic()
        try:
            yield
        finally:
            spent = time.monotonic() - began
            with self._lock:
                self._seconds[name] = self._seconds.get(name, 0.0) + spent

    def take(self) -> dict[str, float]:
        """Returns all sums as metrics `time_NAME_s` and resets them."""
        with self._lock:
            taken, self._seconds = self._seconds, {}
        return {f"time_{name}_s": seconds for name, seconds in taken.items()}
