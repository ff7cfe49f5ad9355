"""The rank that speaks to the servers: which of them are up to date, and the steps of a publication."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

from megatron_parallel_r1.errors import ServersLost, UserError
from megatron_parallel_r1.rollout.servers.client import Unreachable
from megatron_parallel_r1.sync.buckets import Bucket
from megatron_parallel_r1.sync.control import RowScores, ServerControl, TokenRow, WeightsInfo
from megatron_parallel_r1.sync.probe import ServerScores, TrainerScores, difference, passes
from megatron_parallel_r1.sync.settings import Sync

LOG = logging.getLogger(__name__)
R = TypeVar("R")


class Sender:
    """The servers and what they hold. Only rank 0 has one."""

    def __init__(self, servers: Sequence[ServerControl], transport: Transport, settings: Sync) -> None:
        self.servers = {server.url: server for server in servers}
        self.transport, self.settings = transport, settings
        self.failed: dict[str, str] = {}
        self._active: list[ServerControl] = []
        self._infos: dict[str, WeightsInfo] = {}
        self._scores: dict[str, Sequence[RowScores]] = {}
        self._broken: Exception | None = None
        self._passes = 0

    @property
    def up_to_date(self) -> tuple[str, ...]:
        """Servers that hold the whole last version."""
        return tuple(server.url for server in self._active)

    def pause(self) -> bool:
        """Pauses the servers that answer; returns whether some need the output matrix under its own name."""
        self.failed, self._passes = {}, 0
        self._active = list(self.servers.values())
        if wrong := [server.url for server in self._active if self.settings.transport not in server.kinds]:
            raise UserError(
                f"{wrong[0]} takes no weights by sync.transport {self.settings.transport}; "
                f"set it to one of {', '.join(sorted(self.servers[wrong[0]].kinds))}"
            )
        self._infos = self._try(lambda server: server.info())
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
        """Pauses the servers and frees their memory."""
        self._active = list(self.servers.values())
        self._try(lambda server: server.pause(self.settings.in_flight))
        self._try(lambda server: server.release_memory())

    def resume_memory(self) -> None:
        """Allocates their memory again; they wait for weights."""
        self._try(lambda server: server.resume_memory("weights"))
        self._try(lambda server: server.resume_memory("kv_cache"))

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
        for url, why in reasons.items():
            LOG.warning("%s is out of date and gets no requests until it takes a whole update: %s", url, why)
        self.failed |= reasons
        self._active = [server for server in self._active if server.url not in reasons]
        if not self._active:
            url, why = next(reversed(self.failed.items()))
            raise ServersLost(f"no rollout server is left that takes weights; the last failed with: {why}")


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
    """A way to the servers, on rank 0 only. A pass is `open`, `send` of every bucket, `close`.

    A failure of one server does not raise; `close` returns it.
    """

    def open(self, servers: Sequence[ServerControl], infos: Mapping[str, WeightsInfo], version: int) -> None:
        """Begins a pass; `infos` of each server, by URL, were just read."""

    def send(self, bucket: Bucket) -> None: ...

    def close(self) -> PassResult: ...

    def end(self) -> None:
        """Frees what lasts from one pass to the next."""
