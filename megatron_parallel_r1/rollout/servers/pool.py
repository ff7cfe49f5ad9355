"""Serves requests from many rollout servers: each goes to one that is up and holds the right weights.

A request that fails is retried on another server, from its own tokens and with its seed. Where draws are
keyed by seed and position (`ServerInfo.seeded`), the result is the same; servers that ignore seeds draw anew,
from the same distribution.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_parallel_r1.errors import ServersLost, UserError
from megatron_parallel_r1.rollout.engine import Interrupted
from megatron_parallel_r1.rollout.servers.client import (
    STOCK_MODES,
    GenerateRequest,
    GenerateResult,
    Server,
    ServerInfo,
    Unreachable,
    describe_version,
)
from megatron_parallel_r1.rollout.servers.front import check_router, passes_blocks
from megatron_parallel_r1.rollout.servers.registry import ServerRegistry, ServerState
from megatron_parallel_r1.rollout.servers.router import CacheAwareRouter, Ticket
from megatron_parallel_r1.thought.layout import Mode

LOG = logging.getLogger(__name__)
MAX_BACKOFF_S = 10.0


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """How servers are used.

    Attributes:
        concurrent: maximum requests in flight at one server, over all processes that share it.
        check_s: between two checks of a server.
        patience_s: how long no server may be usable before the run gives up.
        attempts: failures of one request before it is taken for their cause.
        backoff_s: before the first retry; doubled with each.
    """

    concurrent: int = 128
    check_s: float = 5.0
    patience_s: float = 300.0
    attempts: int = 6
    backoff_s: float = 0.2


class _LoopState:
    """The pool's state in the event loop that uses it now.

    Attributes:
        wake: set to check servers at once.
        checked: set after each check.
        waiting: requests that wait for a server.
        in_flight: requests under way.
    """

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.wake, self.checked = asyncio.Event(), asyncio.Event()
        self.waiting: set[asyncio.Future[ServerState]] = set()
        self.in_flight: set[asyncio.Task[GenerateResult]] = set()
        self.watch: asyncio.Task[None] | None = None


class ServerPool:
    """Sends requests to servers. Use it in one event loop after another, one at a time; any thread may call
    `interrupt`, `set_version`, `add`, `remove`, `metrics` and `gauges`.

    Args:
        connect: creates a client for the server at an address.
        urls_file: a file of addresses, one a line, that is read again while the pool is used: a server added
            to it joins, one removed from it leaves.
        version: of the weights that the servers must hold; None: that of the first one that answers.
        router: address to which requests go while a server is usable, instead of to the servers themselves.
    """

    def __init__(
        self,
        connect: Callable[[str], Server],
        urls: Sequence[str] = (),
        settings: PoolSettings = PoolSettings(),
        urls_file: Path | None = None,
        version: int | None = None,
        router: str | None = None,
    ) -> None:
        self._settings = settings
        self._registry = ServerRegistry(connect, urls_file, version)
        self._front = None if router is None else ServerState(connect(router))
        self._router = CacheAwareRouter(settings.concurrent)
        self._state: _LoopState | None = None
        self._interrupted = False
        self._counts: Counter[str] = Counter()
        self._lost_reported = 0
        for url in urls:
            self._registry.add(url)

    @property
    def version(self) -> int:
        """Of the weights that a usable server holds; 0 before any server has reported."""
        return 0 if self._registry.version is None else self._registry.version

    @property
    def modes(self) -> frozenset[Mode]:
        """Modes in which all usable servers are exact."""
        return STOCK_MODES if self._registry.modes is None else self._registry.modes

    @property
    def infos(self) -> Mapping[str, ServerInfo]:
        """What each server last reported, by address."""
        return self._registry.infos

    def wait_ready(self) -> None:
        """Waits until each server has reported or failed to, and one is usable; call this first.

        Raises:
            ServersLost: none is usable within `patience_s`.
            UserError: all refuse.
        """
        asyncio.run(self._wait_ready())

    def share(self, rank: int, size: int) -> None:
        """Sets which of `size` processes that use the same servers this one is.

        With at least as many servers as processes, each process has servers of its own; with fewer, several
        share one, and its `concurrent`. Other servers serve as a fallback while none of its own is usable;
        only then, and by rank 0, are they checked at all. Call this before `wait_ready`.
        """
        processes = self._registry.share(rank, size)
        each = self._settings.concurrent // processes
        if self._front is not None:
            each = self._settings.concurrent * len(self._registry) // size
        self._router = CacheAwareRouter(max(1, each))

    def add(self, url: str) -> None:
        """Adds a server; it gets requests once it has reported."""
        self._registry.add(url)
        self._wake()

    def remove(self, url: str) -> None:
        """Stops sending requests to a server; those in flight may finish."""
        self._registry.remove(url)
        self._wake()

    def set_version(self, version: int, urls: Iterable[str]) -> None:
        """Records that these servers hold new weights. Others get no requests until they report them too."""
        self._registry.set_version(version, urls)
        self._wake()

    def interrupt(self) -> None:
        """Ends requests under way, and all later ones, with `Interrupted`."""
        self._interrupted = True
        self._call(self._interrupt_all)

    def metrics(self) -> dict[str, float]:
        """Counts since the last call, for the step log.

        `server_requests`, `server_retries`, `server_tokens` (drawn), `server_prompt_tokens` (sent),
        `server_cached_share` (of these in a server's cache), `servers_lost`, and now `servers_up` and of
        these `servers_unseeded`, which ignore seeds.
        """
        counts, self._counts = self._counts, Counter()
        lost, self._lost_reported = self._registry.lost - self._lost_reported, self._registry.lost
        metrics = {f"server_{name}": float(counts[name]) for name in ("requests", "retries", "tokens")}
        metrics["server_prompt_tokens"] = float(counts["prompt"])
        metrics["server_cached_share"] = counts["cached"] / max(1, counts["prompt"])
        metrics["servers_lost"] = float(lost)
        up = [server.info for server in self._registry.servers() if server.status == "up"]
        metrics["servers_up"] = float(len(up))
        metrics["servers_unseeded"] = float(sum(info is not None and not info.seeded for info in up))
        return metrics

    def gauges(self) -> dict[str, float]:
        """Returns the state now: `servers`, `servers_up`; of this process `requests_running` and
        `requests_waiting`.
        """
        servers, state = self._registry.servers(), self._state
        return {
            "servers": float(len(servers)),
            "servers_up": float(sum(server.status == "up" for server in servers)),
            "requests_running": float(len(state.in_flight) if state else 0),
            "requests_waiting": float(len(state.waiting) if state else 0),
        }

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """One continuation, retried until some server returns it.

        Raises:
            Interrupted: `interrupt` was called.
            ServersLost: no server is left.
            UserError: a server refuses the request, or it fails `attempts` times.
        """
        self._counts["requests"] += 1
        failures = 0
        while True:
            server = await self._acquire(request)
            try:
                return await self._send(server, request)
            except Unreachable as error:
                failures += 1
                server.mark_doubted(str(error))
                self._update()
            finally:
                self._router.release(server.url)
            if failures == self._settings.attempts:
                if server is self._front:
                    raise ServersLost(f"{failures} failures by way of rollout.router: {server.problem}")
                raise UserError(
                    f"a continuation of {len(request.tokens)} tokens failed {failures} times, the last time "
                    f"with: {server.problem}; see the log of {server.url}"
                )
            self._wake()
            self._counts["retries"] += 1
            backoff_s = min(MAX_BACKOFF_S, self._settings.backoff_s * 2.0 ** (failures - 1))
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))

    async def _wait_ready(self) -> None:
        state = self._entered()
        while not self._registry.usable() or any(s.status == "new" for s in self._registry.watched()):
            failure = self._registry.failure(self._settings.patience_s)
            if failure:
                raise failure
            state.checked.clear()
            await state.checked.wait()
        self._registry.fix_modes()
        if self._front is not None:
            await self._check_front(self._front.client)

    async def _check_front(self, router: Server) -> None:
        try:
            await check_router(router, all(info.seeded for info in self.infos.values()))
            if "isolated" in self.modes and not await passes_blocks(router):
                LOG.warning("warning: %s drops custom_params: no mode isolated through it", router.url)
                self._registry.modes = self.modes - {"isolated"}
        except Unreachable as error:
            raise ServersLost(f"rollout.router: {error}; start it, or leave it out") from None

    async def _acquire(self, request: GenerateRequest) -> ServerState:
        """A usable server, with one of its request slots taken."""
        state = self._entered()
        if self._interrupted:
            raise Interrupted("the engine was interrupted")
        future: asyncio.Future[ServerState] = state.loop.create_future()

        def granted(url: str) -> None:
            # A request that was interrupted while it waited passes its slot on.
            if future.done():
                self._router.release(url)
            else:
                front = self._front
                future.set_result(front if front is not None and url == front.url else self._registry[url])

        ticket = Ticket(request.trace, hash(request.tokens), granted)
        state.waiting.add(future)
        self._router.submit(ticket)
        try:
            return await future
        except (asyncio.CancelledError, Interrupted, UserError):
            self._router.withdraw(ticket)
            if future.done() and not future.cancelled() and future.exception() is None:
                self._router.release(future.result().url)
            raise
        finally:
            state.waiting.discard(future)

    async def _send(self, server: ServerState, request: GenerateRequest) -> GenerateResult:
        version, state = self.version, self._entered()
        max_length = len(request.tokens) + request.limit
        infos = self.infos.values() if server is self._front else filter(None, [server.info])
        max_tokens = min((info.max_tokens for info in infos), default=max_length)
        if max_length > max_tokens:
            raise UserError(
                f"{server.url} takes {max_tokens} tokens, prompt and continuation together; "
                f"{len(request.tokens)} and up to {request.limit} do not fit: start it with a longer "
                "context, or lower max_response_tokens"
            )
        task = asyncio.ensure_future(server.client.generate(request))
        server.in_flight.add(task)
        state.in_flight.add(task)
        try:
            await asyncio.wait({task})
        finally:
            task.cancel()
            server.in_flight.discard(task)
            state.in_flight.discard(task)
        if task.cancelled():
            if self._interrupted:
                raise Interrupted("the engine was interrupted")
            raise Unreachable(server.problem)
        result = task.result()
        oldest = min(result.completion.versions)
        if oldest < version:
            raise Unreachable(
                f"{server.url} drew with weights {describe_version(oldest)}, not {version}: was it restarted?"
            )
        self._counts["tokens"] += len(result.completion.tokens)
        self._counts["prompt"] += len(request.tokens)
        self._counts["cached"] += result.cached_tokens
        return result

    def _entered(self) -> _LoopState:
        """The running loop's state; its first use starts the watch, which lasts as long as the loop."""
        if self._state is None or self._state.loop is not asyncio.get_running_loop():
            state = self._state = _LoopState()
            self._router.set_usable(self._destinations())
            every_s = min(self._settings.check_s, self._settings.patience_s)
            state.watch = state.loop.create_task(self._registry.watch(every_s, state.wake, self._update))
        return self._state

    def _destinations(self) -> tuple[str, ...]:
        """Where requests may go now."""
        usable = self._registry.usable()
        return (self._front.url,) if self._front is not None and usable else usable

    def _update(self) -> None:
        """Gives the router the usable servers; fails waiting requests if there is no hope of one."""
        state = self._state
        assert state is not None
        self._router.set_usable(self._destinations())
        failure = self._registry.failure(self._settings.patience_s)
        for waiting in list(state.waiting) if failure else ():
            if failure and not waiting.done():
                waiting.set_exception(failure)
        state.checked.set()

    def _interrupt_all(self) -> None:
        assert self._state is not None
        for waiting in list(self._state.waiting):
            if not waiting.done():
                waiting.set_exception(Interrupted("the engine was interrupted"))
        for task in list(self._state.in_flight):
            task.cancel()

    def _wake(self) -> None:
        if self._state is not None:
            self._call(self._state.wake.set)

    def _call(self, function: Callable[[], object]) -> None:
        """Calls `function` in the pool's loop, from any thread; does nothing if that has ended."""
        if self._state is not None:
            with contextlib.suppress(RuntimeError):
                self._state.loop.call_soon_threadsafe(function)
