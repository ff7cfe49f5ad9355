"""Many rollout servers as one: a continuation goes to a server that is up and holds the right weights.

What a server leaves undone is asked of another one, from the continuation's own tokens and with its seed.
Where draws are keyed by seed and position (`About.seeded`), what comes is what would have come; servers that
ignore seeds draw anew, from the same distribution.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.engine import Interrupted
from megatron_parallel_r1.rollout.servers.client import (
    STOCK_MODES,
    About,
    Answered,
    Asked,
    Server,
    Unreachable,
    told_version,
)
from megatron_parallel_r1.rollout.servers.registry import Member, Roster
from megatron_parallel_r1.rollout.servers.router import Placing, Ticket
from megatron_parallel_r1.thought.layout import Mode

LONGEST_BACKOFF_S = 10.0


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """How servers are treated.

    Attributes:
        concurrent: requests at one server at most, of all processes that share it.
        check_s: between two checks of a server, in seconds.
        patience_s: how long no server may be usable before the run gives up, in seconds.
        attempts: failures of one continuation before it counts as their cause.
        backoff_s: before the first retry, in seconds; doubled with each.
    """

    concurrent: int = 128
    check_s: float = 5.0
    patience_s: float = 300.0
    attempts: int = 6
    backoff_s: float = 0.2


class _Here:
    """What belongs to the event loop that uses the pool now.

    Attributes:
        wake: set when a server should be looked at.
        looked: set after each look.
        waiting: for a server.
        asked: requests under way.
    """

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.wake, self.looked = asyncio.Event(), asyncio.Event()
        self.waiting: set[asyncio.Future[Member]] = set()
        self.asked: set[asyncio.Task[Answered]] = set()
        self.watch: asyncio.Task[None] | None = None


class Pool:
    """Asks servers. It may be used in one event loop after another, by one at a time; `interrupt`,
    `published`, `add`, `remove` and `metrics` may be called from any thread.

    Args:
        connect: a client of the server at an address.
        urls: of servers.
        urls_file: a file of addresses, one a line, that is read again while the pool is used: a server that
            is added to it joins, one that is taken out leaves.
        version: of the weights that the servers must hold; None: that of the first one that answers.
    """

    def __init__(
        self,
        connect: Callable[[str], Server],
        urls: Sequence[str] = (),
        settings: PoolSettings = PoolSettings(),
        urls_file: Path | None = None,
        version: int | None = None,
    ) -> None:
        self._settings = settings
        self._roster = Roster(connect, urls_file, version)
        self._placing = Placing(settings.concurrent)
        self._here: _Here | None = None
        self._interrupted = False
        self._counts: Counter[str] = Counter()
        self._lost_told = 0
        for url in urls:
            self._roster.add(url)

    @property
    def version(self) -> int:
        """Of the weights that a server must hold to be asked; 0 before the pool has met any."""
        return 0 if self._roster.version is None else self._roster.version

    @property
    def modes(self) -> frozenset[Mode]:
        """Modes in which all servers are exact that may be asked."""
        return STOCK_MODES if self._roster.modes is None else self._roster.modes

    @property
    def abouts(self) -> Mapping[str, About]:
        """What the servers last told, by address."""
        return self._roster.abouts

    def meet(self) -> None:
        """Waits until each server has told of itself or failed to, and one may be asked; to be called first.

        Raises:
            ServersLost: there is none within the patience that is set.
            UserError: all refuse what is promised.
        """
        asyncio.run(self._met())

    def share(self, rank: int, size: int) -> None:
        """Tells which of `size` processes that use the same servers this one is.

        With as many servers as processes or more, each process has servers of its own; with fewer, several
        share one, and its `concurrent`. Others' servers are asked while none of one's own may be.
        """
        sharing = self._roster.share(rank, size)
        self._placing = Placing(max(1, self._settings.concurrent // sharing))

    def add(self, url: str) -> None:
        """Lets a server join; it is asked once it has told of itself."""
        self._roster.add(url)
        self._stir()

    def remove(self, url: str) -> None:
        """Asks a server nothing any more; what it has under way it may finish."""
        self._roster.remove(url)
        self._stir()

    def published(self, version: int, urls: Iterable[str]) -> None:
        """Tells that these servers hold new weights. Others are not asked until they say that they do."""
        self._roster.published(version, urls)
        self._stir()

    def interrupt(self) -> None:
        """Ends what is under way or asked later with `Interrupted`."""
        self._interrupted = True
        self._call(self._end_all)

    def metrics(self) -> dict[str, float]:
        """Counts since the last call, for the step log.

        `server_requests`, `server_retries`, `server_tokens` (drawn), `server_prompt_tokens` (asked),
        `server_cached_share` (of these in a server's cache), `servers_lost`, and now `servers_up` and of
        these `servers_unseeded`, which ignore seeds.
        """
        counts, self._counts = self._counts, Counter()
        lost, self._lost_told = self._roster.lost - self._lost_told, self._roster.lost
        told = {f"server_{name}": float(counts[name]) for name in ("requests", "retries", "tokens")}
        told["server_prompt_tokens"] = float(counts["prompt"])
        told["server_cached_share"] = counts["cached"] / max(1, counts["prompt"])
        told["servers_lost"] = float(lost)
        up = [member.about for member in self._roster.members() if member.state == "up"]
        told["servers_up"] = float(len(up))
        told["servers_unseeded"] = float(sum(about is not None and not about.seeded for about in up))
        return told

    async def generate(self, asked: Asked) -> Answered:
        """One continuation, from whichever server gives it.

        Raises:
            Interrupted: somebody called `interrupt`.
            ServersLost: no server is left.
            UserError: one refuses what is asked, or it fails again and again.
        """
        self._counts["requests"] += 1
        failures = 0
        while True:
            member = await self._placed(asked)
            try:
                return await self._answered(member, asked)
            except Unreachable as error:
                failures += 1
                member.doubt(str(error))
                self._look()
            finally:
                self._placing.done(member.url)
            if failures == self._settings.attempts:
                raise UserError(
                    f"a continuation of {len(asked.tokens)} tokens failed {failures} times, last so: "
                    f"{member.trouble}; see the log of {member.url}"
                )
            self._stir()
            self._counts["retries"] += 1
            whole_s = min(LONGEST_BACKOFF_S, self._settings.backoff_s * 2.0 ** (failures - 1))
            await asyncio.sleep(whole_s * random.uniform(0.5, 1.0))

    async def several(self, asked: Asked, count: int) -> list[Answered]:
        """So many continuations of one text, each with a seed of its own; `asked` has the first one's.

        They go to one server, whose prefix cache has the text once. An engine's own `n` would draw all of
        them with one seed.
        """
        seeds = [(asked.sampling.seed + number) % 2**63 for number in range(count)]
        each = [replace(asked, sampling=replace(asked.sampling, seed=seed)) for seed in seeds]
        return list(await asyncio.gather(*map(self.generate, each)))

    async def _met(self) -> None:
        here = self._entered()
        while not self._roster.usable() or any(m.state == "new" for m in self._roster.members()):
            complaint = self._roster.complaint(self._settings.patience_s)
            if complaint:
                raise complaint
            here.looked.clear()
            await here.looked.wait()
        self._roster.settle_modes()

    async def _placed(self, asked: Asked) -> Member:
        """A server that may be asked, with one of its places taken."""
        here = self._entered()
        if self._interrupted:
            raise Interrupted("the engine was told to end")
        place: asyncio.Future[Member] = here.loop.create_future()

        def granted(url: str) -> None:
            # Whoever was told to end while it waited leaves its place to the next.
            if place.done():
                self._placing.done(url)
            else:
                place.set_result(self._roster[url])

        ticket = Ticket(asked.trace, hash(asked.tokens), granted)
        here.waiting.add(place)
        self._placing.ask(ticket)
        try:
            return await place
        except (asyncio.CancelledError, Interrupted, UserError):
            self._placing.withdraw(ticket)
            if place.done() and not place.cancelled() and place.exception() is None:
                self._placing.done(place.result().url)
            raise
        finally:
            here.waiting.discard(place)

    async def _answered(self, member: Member, asked: Asked) -> Answered:
        about, version, here = member.about, self.version, self._entered()
        longest = len(asked.tokens) + asked.limit
        if about is not None and longest > about.max_tokens:
            raise UserError(
                f"{member.url} takes {about.max_tokens} tokens, prompt and continuation together; "
                f"{len(asked.tokens)} and up to {asked.limit} do not fit: start it with a longer context, or "
                "lower max_response_tokens"
            )
        answer = asyncio.ensure_future(member.server.generate(asked))
        member.asks.add(answer)
        here.asked.add(answer)
        try:
            await asyncio.wait({answer})
        finally:
            answer.cancel()
            member.asks.discard(answer)
            here.asked.discard(answer)
        if answer.cancelled():
            if self._interrupted:
                raise Interrupted("the engine was told to end")
            raise Unreachable(member.trouble)
        answered = answer.result()
        oldest = min(answered.completion.versions)
        if oldest < version:
            raise Unreachable(
                f"{member.url} drew with weights {told_version(oldest)}, not {version}: it was started anew?"
            )
        self._counts["tokens"] += len(answered.completion.tokens)
        self._counts["prompt"] += len(asked.tokens)
        self._counts["cached"] += answered.cached_tokens
        return answered

    def _entered(self) -> _Here:
        """The running loop's; its first user has the servers watched as long as the loop runs."""
        if self._here is None or self._here.loop is not asyncio.get_running_loop():
            here = self._here = _Here()
            self._placing.use(self._roster.usable())
            every_s = min(self._settings.check_s, self._settings.patience_s)
            here.watch = here.loop.create_task(self._roster.watch(every_s, here.wake, self._look))
        return self._here

    def _look(self) -> None:
        """Has who waits asked of the servers that may be, or told that there is none."""
        here = self._here
        assert here is not None
        self._placing.use(self._roster.usable())
        complaint = self._roster.complaint(self._settings.patience_s)
        for waiting in list(here.waiting) if complaint else ():
            if not waiting.done():
                waiting.set_exception(complaint)
        here.looked.set()

    def _end_all(self) -> None:
        assert self._here is not None
        for waiting in list(self._here.waiting):
            if not waiting.done():
                waiting.set_exception(Interrupted("the engine was told to end"))
        for answer in list(self._here.asked):
            answer.cancel()

    def _stir(self) -> None:
        if self._here is not None:
            self._call(self._here.wake.set)

    def _call(self, what: Callable[[], object]) -> None:
        """In the pool's loop, from any thread; nothing if that has ended."""
        if self._here is not None:
            with contextlib.suppress(RuntimeError):
                self._here.loop.call_soon_threadsafe(what)
