"""Keeps the known rollout servers, their state, and which of them may serve requests now."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from megatron_parallel_r1.errors import ServersLost, UserError
from megatron_parallel_r1.rollout.servers.client import (
    STOCK_MODES,
    Server,
    ServerInfo,
    Unreachable,
    describe_version,
)
from megatron_parallel_r1.thought.layout import Mode

ServerStatus = Literal["new", "up", "doubted", "down", "refused"]

# A server that is up may miss a single health check.
MAX_MISSES = 2


class ServerRegistry:
    """The servers of a pool; those that this process may need are checked periodically while `watch` runs.

    A server is usable if it is up, holds the pool's weights, and is exact in the pool's modes.

    Arguments as for `pool.ServerPool`.

    Attributes:
        lost: servers that were up and went down, in total.
    """

    def __init__(self, connect: Callable[[str], Server], urls_file: Path | None, version: int | None) -> None:
        self.version = version
        self.modes: frozenset[Mode] | None = None
        self.lost = 0
        self._connect = connect
        self._servers: dict[str, ServerState] = {}
        self._removed: dict[str, ServerState] = {}
        self._urls_file, self._urls_text = urls_file, ""
        self._rank, self._size = 0, 1
        self._unusable_since: float | None = None
        self.read_urls()

    def __len__(self) -> int:
        return len(self._servers)

    def __getitem__(self, url: str) -> ServerState:
        """Also returns a removed server: another thread may remove it while it is being chosen."""
        return self._servers.get(url) or self._removed[url]

    def servers(self) -> list[ServerState]:
        """A copy: other threads may change the registry."""
        return list(self._servers.values())

    @property
    def infos(self) -> Mapping[str, ServerInfo]:
        """What each server last reported, by address."""
        return {server.url: server.info for server in self.servers() if server.info is not None}

    def add(self, url: str) -> None:
        client = self._connect(url)
        self._servers.setdefault(client.url, ServerState(client))

    def remove(self, url: str) -> None:
        server = self._servers.get(url.rstrip("/"))
        if server is not None:
            self._removed[server.url] = server
            del self._servers[server.url]

    def share(self, rank: int, size: int) -> int:
        """See `ServerPool.share`; returns the number of processes that use each server."""
        assert 0 <= rank < size, (rank, size)
        self._rank, self._size = rank, size
        return -(-size // max(1, len(self)))

    def set_version(self, version: int, urls: Iterable[str]) -> None:
        """See `ServerPool.set_version`."""
        updated = {url.rstrip("/") for url in urls}
        for server in self.servers():
            if server.url in updated and server.info is not None:
                server.info = replace(server.info, version=version)
        self.version = version

    def fix_modes(self) -> None:
        """From now on a server must be exact in the modes that all watched servers usable now share."""
        usable = [server for server in self.watched() if self._why_unusable(server) is None]
        modes = [server.info.modes for server in usable if server.info is not None]
        self.modes = frozenset.intersection(*modes) if modes else STOCK_MODES

    def usable(self) -> tuple[str, ...]:
        """Addresses of usable servers: this process's own, or all others if none of its own is usable."""
        servers, own = self.servers(), self._own()
        if self.version is None:
            versions = [server.info.version for server in servers if server.status == "up" and server.info]
            self.version = max(versions, default=None)
        rotated = [servers[(self._rank + i) % len(servers)] for i in range(len(servers))]
        usable = [server.url for server in own if self._why_unusable(server) is None]
        return tuple(usable or [server.url for server in rotated if self._why_unusable(server) is None])

    def watched(self) -> list[ServerState]:
        """The servers to check: this process's own, and while none of them is usable all others.

        The first process checks all, for it publishes weights to them. So each server is checked by few
        processes, however many there are.
        """
        own = self._own()
        may_do = any(server.status == "new" or self._why_unusable(server) is None for server in own)
        return own if self._rank and may_do else self.servers()

    def _own(self) -> list[ServerState]:
        """This process's servers; with more processes than servers it is one, which it shares with others."""
        servers = self.servers()
        size = min(self._size, max(1, len(servers)))
        return servers[self._rank % size :: size]

    def failure(self, patience_s: float) -> UserError | None:
        """The error to give up with: all servers refuse, or none was usable for `patience_s`; None: go on."""
        servers = self.servers()
        if self.usable():
            self._unusable_since = None
            return None
        self._unusable_since = self._unusable_since or time.monotonic()
        waited_s = time.monotonic() - self._unusable_since
        refused = bool(servers) and all(server.status == "refused" for server in servers)
        if not refused and waited_s < patience_s:
            return None
        reasons = "; ".join(f"{server.url} ({self._why_unusable(server)})" for server in servers)
        return (UserError if refused else ServersLost)(
            f"no rollout server usable for {waited_s:.0f} s: {reasons or 'none is known'}; restart the "
            "servers, or name others in rollout.urls or rollout.urls_file; the run resumes from its last "
            "checkpoint"
        )

    async def watch(self, every_s: float, wake: asyncio.Event, changed: Callable[[], None]) -> None:
        """Checks each server every `every_s`, and doubted ones as soon as `wake` is set; never returns.

        Args:
            changed: called after each check that changed a server's state, and each time the file of
                addresses was read.
        """
        self._unusable_since = None
        due: dict[ServerState, float] = {}
        checks: dict[ServerState, asyncio.Task[None]] = {}
        watched = 0

        async def check(server: ServerState) -> None:
            before = server.status, server.info
            lost = await server.check(self.version)
            self.lost += lost  # After the wait: other checks count too.
            del checks[server]
            # It looks at all servers: a round of checks that change nothing must not cost their square.
            if (server.status, server.info) != before:
                changed()
                if len(self.watched()) > watched:
                    wake.set()

        while True:
            wake.clear()
            self.read_urls()
            now = time.monotonic()
            servers = self.watched()
            watched = len(servers)
            for server in servers:
                is_due = due.get(server, now) <= now
                if server not in checks and (is_due or server.status == "doubted"):
                    due[server] = now + every_s
                    checks[server] = asyncio.ensure_future(check(server))
            changed()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(wake.wait(), every_s)

    def read_urls(self) -> None:
        """Follows the file of addresses; while it cannot be read, all servers stay."""
        if self._urls_file is None:
            return
        try:
            text = self._urls_file.read_text()
        except OSError:
            return
        if text == self._urls_text:
            return
        before, now = _parse_urls(self._urls_text), _parse_urls(text)
        self._urls_text = text
        for url in now - before:
            self.add(url)
        for url in before - now:
            self.remove(url)

    def _why_unusable(self, server: ServerState) -> str | None:
        if server.status != "up" or server.info is None:
            return f"{server.status}: {server.problem}"
        if server.info.version != self.version:
            held, wanted = describe_version(server.info.version), describe_version(self.version)
            return f"it holds weights {held}, not {wanted}"
        missing = (self.modes or frozenset()) - server.info.modes
        return f"it is not exact in mode {', '.join(sorted(missing))}" if missing else None


@dataclass(eq=False, slots=True)
class ServerState:
    """A server of the pool.

    Attributes:
        client: speaks to it.
        status: `new` until it has reported; `doubted` from a failed request until the next check;
            `refused`: it answers, but cannot serve what is required.
        info: its last report.
        problem: the last thing that went wrong.
        misses: failed checks in a row.
        in_flight: requests under way, cancelled when the server goes down.
    """

    client: Server
    status: ServerStatus = "new"
    info: ServerInfo | None = None
    problem: str = "it has not answered yet"
    misses: int = 0
    in_flight: set[asyncio.Task[Any]] = field(default_factory=set)

    @property
    def url(self) -> str:
        return self.client.url

    def mark_doubted(self, problem: str) -> None:
        self.problem = problem
        if self.status == "up":
            self.status = "doubted"

    async def check(self, version: int | None) -> bool:
        """Checks health, and reads the server's info if it is not up or holds another than `version`.

        Returns:
            Whether this check lost it: it was up and no longer is.
        """
        before = self.status
        try:
            if before == "up" and self.info is not None and version in (None, self.info.version):
                if not await self.client.healthy():
                    raise Unreachable(f"{self.url} does not answer its health check")
            else:
                self.info = await self.client.info()
        except Unreachable as error:
            self.problem = str(error)
            self.misses += 1
            if before == "up" and self.misses < MAX_MISSES:
                return False
            self.status = "down"
            for request in self.in_flight:
                request.cancel()
            return before in ("up", "doubted")
        except UserError as error:
            self.problem = str(error)
            self.status = "refused"
            return before in ("up", "doubted")
        self.status, self.misses = "up", 0
        return False


def _parse_urls(text: str) -> set[str]:
    lines = (line.strip().rstrip("/") for line in text.splitlines())
    return {line for line in lines if line and not line.startswith("#")}
