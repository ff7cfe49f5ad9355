"""Who is served now, who waits, and who is sent away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from megatron_parallel_r1.serve.api_error import Refused
from megatron_parallel_r1.serve.limits import Limits

RETRY_AFTER = "5"  # seconds


class Admission:
    """Lets requests in one after the other, in the order of their arrival."""

    def __init__(self, limits: Limits) -> None:
        self.running = 0
        self.waiting = 0
        self._limits = limits
        self._cache_tokens = 0
        self._door = asyncio.Lock()
        self._left = asyncio.Event()

    @asynccontextmanager
    async def place(self, cache_tokens: int) -> AsyncIterator[None]:
        """Waits for a turn and keeps it.

        Args:
            cache_tokens: that the request may come to hold; no more than all together may.

        Raises:
            Refused: 503; too many wait already.
        """
        if self.waiting >= self._limits.waiting:
            raise Refused(
                503,
                f"{self.waiting} requests wait already; ask again in some seconds",
                code="queue_full",
                headers={"Retry-After": RETRY_AFTER},
            )
        self.waiting += 1
        try:
            # Who came first stands in the door, so that a small request overtakes no large one.
            async with self._door:
                while not self._has_room(cache_tokens):
                    self._left.clear()
                    await self._left.wait()
                self.running += 1
                self._cache_tokens += cache_tokens
        finally:
            self.waiting -= 1
        try:
            yield
        finally:
            self.running -= 1
            self._cache_tokens -= cache_tokens
            self._left.set()

    def _has_room(self, cache_tokens: int) -> bool:
        most = self._limits.cache_tokens
        fits = most is None or self._cache_tokens + cache_tokens <= most
        return fits and self.running < self._limits.running
