"""The one process that speaks to the servers: which of them are in step, and the steps of a publication."""

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
    """The servers and what they hold. Only the first process has one.

    Args:
        servers: all that take weights.
        transport: of the settings' kind.
        settings: of the sync.
    """

    def __init__(self, servers: Sequence[ServerControl], transport: Transport, settings: Sync) -> None:
        self.servers = {server.url: server for server in servers}
        self.transport, self.settings = transport, settings
        self.out: dict[str, str] = {}
        self._taking: list[ServerControl] = []
        self._facts: dict[str, WeightsInfo] = {}
        self._answers: dict[str, Sequence[RowScores]] = {}
        self._broken: Exception | None = None
        self._passes = 0

    @property
    def in_step(self) -> tuple[str, ...]:
        """Servers that hold the last version, all of it."""
        return tuple(server.url for server in self._taking)

    def pause(self) -> bool:
        """Finds the servers that answer, and stops them; whether some want the output matrix for itself."""
        self.out, self._passes = {}, 0
        self._taking = list(self.servers.values())
        if wrong := [server.url for server in self._taking if self.settings.transport not in server.kinds]:
            raise UserError(
                f"{wrong[0]} takes no weights by sync.transport {self.settings.transport}; "
                f"set it to one of {', '.join(sorted(self.servers[wrong[0]].kinds))}"
            )
        self._facts = self._try(lambda server: server.facts())
        self._try(lambda server: server.pause(self.settings.in_flight))
        return any(server.wants_head for server in self._taking)

    def open(self, version: int) -> None:
        """Begins a pass over all weights."""
        self._broken = None
        self._passes += 1
        if self._passes > 1:
            # A group that broke has members that others lost; who is gone does not answer.
            self._facts = self._try(lambda server: server.facts())
        self.transport.open(self._taking, self._facts, version)

    def send(self, bucket: Bucket) -> None:
        """Does not raise: the other processes would wait with the next bucket. `close` does."""
        try:
            if self._broken is None:
                self.transport.send(bucket)
        except Exception as error:  # as above
            self._broken = error

    def close(self) -> bool:
        """Ends the pass; whether another one is needed."""
        if self._broken is not None:
            raise self._broken
        passed = self.transport.close()
        self._drop(dict(passed.lost))
        if passed.again and self._passes > len(self.servers):
            raise UserError(
                f"weights did not reach {', '.join(self.in_step)} in {self._passes} passes by sync.transport "
                f"{self.settings.transport}; see the servers' logs, or set another transport"
            )
        return passed.again

    def continue_generation(self) -> None:
        """Lets the servers in step go on. The others stay paused: what they hold is no version."""
        self._try(lambda server: server.continue_generation())

    def probe(self, rows: Sequence[TokenRow], trained: TrainerScores) -> tuple[float, list[ServerScores]]:
        """The largest difference over all servers, and the answers that do not pass."""
        scores = self._try(lambda server: server.score(rows))
        answers = [
            ServerScores(url, found, self._answers.get(url), self._facts[url].dtype)
            for url, found in scores.items()
        ]
        self._answers = dict(scores)
        worst = max(difference(one.scores, trained.scores) for one in answers)
        return worst, [one for one in answers if not passes(one, trained, self.settings.tolerance)]

    def release_memory(self) -> None:
        """Stops the servers, which give their memory back."""
        self._taking = list(self.servers.values())
        self._try(lambda server: server.pause(self.settings.in_flight))
        self._try(lambda server: server.release_memory())

    def resume_memory(self) -> None:
        """They take it again, and wait for weights."""
        for part in PARTS:
            self._try(lambda server, part=part: server.resume_memory(part))

    def end(self) -> None:
        self.transport.end()
        for server in self.servers.values():
            server.close()

    def _try(self, work: Callable[[ServerControl], R]) -> dict[str, R]:
        came, failed = map_servers(self._taking, work)
        self._drop(failed)
        return came

    def _drop(self, reasons: dict[str, str]) -> None:
        """Takes servers out of step.

        Raises:
            ServersLost: none is left.
        """
        for url, why in reasons.items():
            LOG.warning("%s is out of step and gets no requests until it takes a whole update: %s", url, why)
        self.out |= reasons
        self._taking = [server for server in self._taking if server.url not in reasons]
        if not self._taking:
            url, why = next(reversed(self.out.items()))
            raise ServersLost(f"no rollout server is left that takes weights; the last one: {why}")


C = TypeVar("C", bound=ServerControl)
R = TypeVar("R")


def map_servers(servers: Sequence[C], work: Callable[[C], R]) -> tuple[dict[str, R], dict[str, str]]:
    """What came back, and why nothing did, by URL."""
    if not servers:
        return {}, {}
    with ThreadPoolExecutor(len(servers)) as pool:
        return collect_results({server.url: pool.submit(work, server) for server in servers})


def collect_results(calls: dict[str, Future[R]]) -> tuple[dict[str, R], dict[str, str]]:
    """As `map_servers`, of calls under way."""
    came: dict[str, R] = {}
    failed: dict[str, str] = {}
    for url, call in calls.items():
        try:
            came[url] = call.result()
        except (UserError, Unreachable) as error:
            failed[url] = str(error)
    return came, failed


def failed_urls(calls: dict[str, Future[R]]) -> set[str]:
    """URLs of calls under way that have failed by now."""
    return {url for url, call in calls.items() if call.done() and call.exception() is not None}


@dataclass(frozen=True, slots=True)
class PassResult:
    """How a pass went.

    Attributes:
        lost: why a server did not take all, by URL.
        again: whether the servers that are left need a new pass.
    """

    lost: Mapping[str, str]
    again: bool = False


class Transport(Protocol):
    """One way to the servers; the sender alone has it. A pass is `open`, `send` of every bucket, `close`.

    What one server does wrong does not raise; `close` tells it.
    """

    def open(self, servers: Sequence[ServerControl], facts: Mapping[str, WeightsInfo], version: int) -> None:
        """Begins a pass.

        Args:
            facts: of each server, by URL, as it gave them just now.
        """
        ...

    def send(self, bucket: Bucket) -> None: ...

    def close(self) -> PassResult: ...

    def end(self) -> None:
        """Lets go of what lasts from one pass to the next."""
        ...
