"""Who is served now, who waits, and who is sent away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from megatron_parallel_r1.serve.refusal import Refused

RETRY_AFTER = "5"  # seconds


class Admission:
    """Lets requests in one after the other, in the order of their arrival."""

    def __init__(self, running: int, waiting: int) -> None:
        self.running = 0
        self.waiting = 0
        self._most_waiting = waiting
        self._slots = asyncio.Semaphore(running)

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Waits for a turn and keeps it.

        Raises:
            Refused: 503; too many wait already.
        """
        if self._slots.locked() and self.waiting >= self._most_waiting:
            raise Refused(
                503,
                f"{self.waiting} requests wait already; ask again in some seconds",
                code="queue_full",
                headers={"Retry-After": RETRY_AFTER},
            )
        self.waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            self._slots.release()
