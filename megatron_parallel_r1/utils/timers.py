"""Seconds of a step by what they went into."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Phases:
    """Sums of seconds by name, since they were last taken; every thread adds to the same.

    A second thread that rolls out ahead works while the training thread does: then the phases of a step
    are more than its time, and those of the rollout belong to whatever batch was under way.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Adds the time of the block; what the block raises counts too."""
        began = time.monotonic()
        try:
            yield
        finally:
            spent = time.monotonic() - began
            with self._lock:
                self._seconds[name] = self._seconds.get(name, 0.0) + spent

    def take(self) -> dict[str, float]:
        """All sums, as metrics `time_NAME_s`; they begin anew."""
        with self._lock:
            taken, self._seconds = self._seconds, {}
        return {f"time_{name}_s": seconds for name, seconds in taken.items()}
