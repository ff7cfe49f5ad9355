"""A rank that speaks to servers: which of them are up to date, and the steps of a publication."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

from megatron_parallel_r1.errors import ServersLost, UserError
from megatron_parallel_r1.rollout.servers.client import Unreachable
from megatron_parallel_r1.sync.buckets import Bucket
from megatron_parallel_r1.sync.control import MemoryPart, RowScores, ServerControl, TokenRow, WeightsInfo
from megatron_parallel_r1.sync.probe import ServerScores, TrainerScores, difference, passes
from megatron_parallel_r1.sync.settings import Sync

LOG = logging.getLogger(__name__)
R = TypeVar("R")
PARTS: tuple[MemoryPart, ...] = ("weights", "kv_cache")


class Sender:
    """The servers of this rank and what they hold.

    Args:
        asleep: whether they have released their memory.
    """

    def __init__(
        self, servers: Sequence[ServerControl], transport: Transport, settings: Sync, asleep: bool = False
    ) -> None:
        self.servers = {server.url: server for server in servers}
        self.transport, self.settings = transport, settings
        self.failed: dict[str, str] = {}
        self._active: list[ServerControl] = []
        self._infos: dict[str, WeightsInfo] = {}
        self._scores: dict[str, Sequence[RowScores]] = {}
        self._broken: Exception | None = None
        self._passes = 0
        # Parts of memory that a server has released. SGLang ends if asked to resume any other.
        self._released: dict[str, set[MemoryPart]] = {}
        if asleep:
            self._released = {url: set(PARTS) for url in self.servers}

    @property
    def up_to_date(self) -> tuple[str, ...]:
        """Servers that hold the whole last version."""
        return tuple(server.url for server in self._active)

    def pause(self) -> bool:
        """Pauses the servers that answer; sleeping ones get memory for weights, undefined ones, and no more.

        Returns:
            Whether some need the output matrix under its own name.
        """
        self.failed, self._passes = {}, 0
        self._active = list(self.servers.values())
        if wrong := [server.url for server in self._active if self.settings.transport not in server.kinds]:
            raise UserError(
                f"{wrong[0]} takes no weights by sync.transport {self.settings.transport}; "
                f"set it to one of {', '.join(sorted(self.servers[wrong[0]].kinds))}"
            )
        self._infos = self._try(lambda server: server.info())
        for url, info in self._infos.items():
            if info.version is None:  # restarted: it has all its memory
                self._released.pop(url, None)
        self.resume_memory("weights")
        self._try(lambda server: server.pause(self.settings.in_flight))
        return any(server.wants_head for server in self._active)

    def open(self, version: int) -> None:
        """Begins a pass over all weights."""
        self._broken = None
        self._passes += 1
        if self._passes > 1:
            # A broken group has members that others lost; a dead server does not answer.
            self._infos = self._try(lambda server: server.info())
        self.transport.open(self._active, self._infos, version)

    def send(self, bucket: Bucket) -> None:
        """Does not raise, for the other ranks would wait with the next bucket; `close` raises instead."""
        try:
            if self._broken is None:
                self.transport.send(bucket)
        except Exception as error:  # as above
            self._broken = error

    def close(self) -> bool:
        """Ends the pass; returns whether another one is needed."""
        if self._broken is not None:
            raise self._broken
        result = self.transport.close()
        self._drop(dict(result.lost))
        if result.again and self._passes > len(self.servers):
            raise UserError(
                f"weights did not reach {', '.join(self.up_to_date)} in {self._passes} passes by "
                f"sync.transport {self.settings.transport}; see the servers' logs, or set another transport"
            )
        return result.again

    def continue_generation(self) -> None:
        """Resumes the servers that are up to date. The others stay paused: they hold no complete version."""
        self._try(lambda server: server.continue_generation())

    def probe(self, rows: Sequence[TokenRow], trained: TrainerScores) -> tuple[float, list[ServerScores]]:
        """The largest difference over all servers, and the scores that do not pass."""
        scores = self._try(lambda server: server.score(rows))
        answers = [
            ServerScores(url, rows_scores, self._scores.get(url), self._infos[url].dtype)
            for url, rows_scores in scores.items()
        ]
        self._scores = dict(scores)
        worst = max(difference(answer.scores, trained.scores) for answer in answers)
        return worst, [a for a in answers if not passes(a, trained, self.settings.tolerance)]

    def release_memory(self) -> None:
        """Pauses the servers and frees their memory; the next publication decides whether enough are left."""
        awake = [server for server in self.servers.values() if server.url not in self._released]
        _, lost = map_servers(awake, self._sleep)
        self._log(lost)
        self._released |= {server.url: set(PARTS) for server in awake if server.url not in lost}

    def _sleep(self, server: ServerControl) -> None:
        server.pause(self.settings.in_flight)
        server.release_memory()

    def resume_memory(self, part: MemoryPart) -> None:
        """Allocates memory of the servers that had released it."""

        def resume(server: ServerControl) -> None:
            if part in self._released.get(server.url, ()):
                server.resume_memory(part)
                self._released[server.url].discard(part)

        self._try(resume)
        self._released = {url: parts for url, parts in self._released.items() if parts}

    def end(self) -> None:
        self.transport.end()
        for server in self.servers.values():
            server.close()

    def _try(self, work: Callable[[ServerControl], R]) -> dict[str, R]:
        results, failures = map_servers(self._active, work)
        self._drop(failures)
        return results

    def _drop(self, reasons: dict[str, str]) -> None:
        """Removes servers from those up to date.

        Raises:
            ServersLost: none is left.
        """
        self._log(reasons)
        self.failed |= reasons
        self._active = [server for server in self._active if server.url not in reasons]
        if not self._active:
            why = next(reversed(self.failed.values()))
            raise ServersLost(f"no rollout server is left that takes weights; the last failed with: {why}")

    def _log(self, reasons: Mapping[str, str]) -> None:
        for url, why in reasons.items():
            LOG.warning("%s is out of date and gets no requests until it takes a whole update: %s", url, why)


C = TypeVar("C", bound=ServerControl)


def map_servers(servers: Sequence[C], work: Callable[[C], R]) -> tuple[dict[str, R], dict[str, str]]:
    """Calls `work` on all servers in parallel; returns results and reasons of failure, by URL."""
    if not servers:
        return {}, {}
    with ThreadPoolExecutor(len(servers)) as pool:
        return collect_results({server.url: pool.submit(work, server) for server in servers})


def collect_results(calls: dict[str, Future[R]]) -> tuple[dict[str, R], dict[str, str]]:
    """As `map_servers`, of calls under way."""
    results: dict[str, R] = {}
    failures: dict[str, str] = {}
    for url, call in calls.items():
        try:
            results[url] = call.result()
        except (UserError, Unreachable) as error:
            failures[url] = str(error)
    return results, failures


def failed_urls(calls: dict[str, Future[R]]) -> set[str]:
    """URLs of calls that have failed so far."""
    return {url for url, call in calls.items() if call.done() and call.exception() is not None}


@dataclass(frozen=True, slots=True)
class PassResult:
    """Why servers did not take all weights, by URL, and whether the others need another pass."""

    lost: Mapping[str, str]
    again: bool = False


class Transport(Protocol):
    """A way to the servers of a sender. A pass is `open`, `send` of every bucket, `close`.

    A failure of one server does not raise; `close` returns it.
    """

    def open(self, servers: Sequence[ServerControl], infos: Mapping[str, WeightsInfo], version: int) -> None:
        """Begins a pass; `infos` of each server, by URL, were just read."""

    def send(self, bucket: Bucket) -> None: ...

    def close(self) -> PassResult: ...

    def end(self) -> None:
        """Frees what lasts from one pass to the next."""
