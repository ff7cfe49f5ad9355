"""Servers that exist in this process alone, and do what a test scripts: die, hang, fall behind."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import replace

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.engine import Completion
from megatron_parallel_r1.rollout.servers.client import (
    STOCK_MODES,
    GenerateRequest,
    GenerateResult,
    ServerInfo,
    Unreachable,
)
from tests.reference.traces import FIRST_TEXT, TAGS

# Tags come often enough for blocks, and ends for short traces.
TOKENS = (
    *(TAGS.parallel,) * 4,
    *(TAGS.path_end,) * 4,
    *(TAGS.summary_end,) * 4,
    *(TAGS.eos,) * 2,
    *range(FIRST_TEXT, 26),
)


class FakeServer:
    """A server whose token hangs on the seed, the position and the token before, as a real one's does.

    Attributes:
        alive: no server is there if not.
        hangs: requests get no answer, health checks fail.
        refuses: what it says to every question about itself.
        failures: so many next requests break off.
        holds_s: how long a request takes.
        fails_on: requests that break off each time.
        seen: what was asked, answered or not.
        most: requests at once, ever.
    """

    def __init__(self, url: str, about: ServerInfo | None = None) -> None:
        self.url = url
        self.info_sent = about or ServerInfo("model", STOCK_MODES, 0, 10_000, None)
        self.alive, self.hangs, self.refuses = True, False, ""
        self.failures, self.holds_s = 0, 0.0
        self.fails_on: Callable[[GenerateRequest], bool] = lambda request: False
        self.seen: list[GenerateRequest] = []
        self.under_way = self.most = 0
        self.gone = asyncio.Event()

    def die(self) -> None:
        """As by kill -9: what is under way breaks off."""
        self.alive = False
        self.gone.set()

    async def info(self) -> ServerInfo:
        if not self.alive or self.hangs:
            raise Unreachable(f"{self.url}: connection refused")
        if self.refuses:
            raise UserError(self.refuses)
        return self.info_sent

    async def healthy(self) -> bool:
        return self.alive and not self.hangs

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        if not self.alive:
            raise Unreachable(f"{self.url}: connection refused")
        self.seen.append(request)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            if self.hangs:
                await asyncio.Event().wait()
            await asyncio.sleep(self.holds_s)
        finally:
            self.under_way -= 1
        if not self.alive:
            raise Unreachable(f"{self.url}: connection reset")
        if self.failures or self.fails_on(request):
            self.failures = max(0, self.failures - 1)
            raise Unreachable(f"{self.url} answered 500: no luck")
        completion = drawn(request)
        versions = (self.info_sent.version,) * len(completion.tokens)
        return GenerateResult(replace(completion, versions=versions), len(request.tokens) // 2)

    async def score(self, tokens: tuple[int, ...]) -> tuple[float, ...]:
        raise NotImplementedError

    async def abort_all(self) -> None:
        raise NotImplementedError

    async def close(self) -> None: ...


def drawn(request: GenerateRequest) -> Completion:
    """What any of the fake servers draws."""
    tokens, logprobs = list(request.tokens), []
    choice = [token for token in TOKENS if token not in request.suppress]
    while len(logprobs) < request.limit:
        key = repr((request.sampling.seed, len(tokens), tokens[-1], len(choice))).encode()
        number = int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "little")
        tokens.append(choice[number % len(choice)])
        logprobs.append(-1.0 - number / 2**32)
        if tokens[-1] in request.stop:
            break
    new = tuple(tokens[len(request.tokens) :])
    return Completion(new, tuple(logprobs), (0,) * len(new), new[-1] in request.stop)
