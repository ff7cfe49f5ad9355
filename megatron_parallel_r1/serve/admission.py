"""Limits on requests, and admission control: requests run, wait in a queue, or are rejected."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from math import ceil

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.serve.schema import ApiError

# Bounds of `Retry-After`, in seconds.
SOONEST, LATEST = 1, 60


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one request and of all requests together, each at least 1.

    Attributes:
        body_bytes: size of a request's body.
        body_seconds: time for a request's body to arrive.
        prompt_tokens: tokens of one prompt, template included.
        max_tokens: tokens of one response, forced ones included; None: the limit of the training.
        choices: responses to one request: prompts times `n`.
        running: requests decoded at once.
        cache_tokens: KV cache tokens that running requests may come to hold; None: unlimited.
        waiting: requests in the queue; a further one is rejected.
        seconds: time from a request's arrival to the end of its response, waiting included.
    """

    body_bytes: int = 2**18
    body_seconds: float = 10.0
    prompt_tokens: int = 4096
    max_tokens: int | None = None
    choices: int = 16
    running: int = 32
    cache_tokens: int | None = None
    waiting: int = 1024
    seconds: float = 600.0

    def __post_init__(self) -> None:
        broken = [name for name, value in asdict(self).items() if value is not None and not value >= 1]
        if broken:
            raise UserError(f"serve: {', '.join(broken)} must be at least 1")


class Admission:
    """Admits requests in the order of their arrival."""

    def __init__(self, limits: Limits) -> None:
        self.running = 0
        self.waiting = 0
        self._limits = limits
        self._cache_tokens = 0
        self._mean_s: float | None = None
        self._head = asyncio.Lock()
        self._freed = asyncio.Event()

    @asynccontextmanager
    async def slot(self, cache_tokens: int) -> AsyncIterator[None]:
        """Waits until the request may run, and holds its slot.

        Args:
            cache_tokens: KV cache tokens that the request may come to hold, at most `limits.cache_tokens`.

        Raises:
            ApiError: 503; the queue is full.
        """
        self.check_room()
        self.waiting += 1
        try:
            # The head of the queue holds the lock, so that no small request overtakes a large one.
            async with self._head:
                while not self._fits(cache_tokens):
                    self._freed.clear()
                    await self._freed.wait()
                self.running += 1
                self._cache_tokens += cache_tokens
        finally:
            self.waiting -= 1
        begin = time.monotonic()
        try:
            yield
        finally:
            self.running -= 1
            self._cache_tokens -= cache_tokens
            took_s = time.monotonic() - begin
            self._mean_s = took_s if self._mean_s is None else 0.9 * self._mean_s + 0.1 * took_s
            self._freed.set()

    def check_room(self) -> None:
        """Checks that the queue has room for a request.

        Raises:
            ApiError: 503; it is full. `Retry-After` is about the time in which it empties.
        """
        if self.waiting >= self._limits.waiting:
            mean_s = SOONEST if self._mean_s is None else self._mean_s
            empties_s = ceil(self.waiting * mean_s / self._limits.running)
            wait_s = min(max(empties_s, SOONEST), LATEST)
            raise ApiError(
                503,
                f"the queue is full ({self.waiting} requests are waiting); try again in {wait_s} s",
                code="queue_full",
                headers={"Retry-After": str(wait_s)},
            )

    def _fits(self, cache_tokens: int) -> bool:
        limit = self._limits.cache_tokens
        fits = limit is None or self._cache_tokens + cache_tokens <= limit
        return fits and self.running < self._limits.running
