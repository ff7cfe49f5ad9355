"""Which servers there are, and which of them may be asked now."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from megatron_parallel_r1.errors import ServersLost, UserError
from megatron_parallel_r1.rollout.servers.client import STOCK_MODES, About, Server, Unreachable, told_version
from megatron_parallel_r1.thought.layout import Mode


class Roster:
    """The servers of a pool, each checked again and again while `watch` runs.

    A server may be asked if it is up, holds the pool's weights, and is exact in the pool's modes.

    Args:
        connect: a client of the server at an address.
        urls_file: a file of addresses, one a line, that is read again at each check: servers join and leave.
        version: of the weights that a server must hold; None: that of the first one that tells.

    Attributes:
        lost: servers that were up and went down, ever.
    """

    def __init__(self, connect: Callable[[str], Server], urls_file: Path | None, version: int | None) -> None:
        self.version = version
        self.modes: frozenset[Mode] | None = None
        self.lost = 0
        self._connect = connect
        self._members: dict[str, Member] = {}
        self._left: dict[str, Member] = {}
        self._urls_file, self._urls_read = urls_file, ""
        self._rank, self._size = 0, 1
        self._alone_since: float | None = None
        self.read_urls()

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, url: str) -> Member:
        """Also one that has left: another thread may remove it while it is being chosen."""
        return self._members.get(url) or self._left[url]

    def members(self) -> list[Member]:
        """A copy: other threads may change the roster."""
        return list(self._members.values())

    @property
    def abouts(self) -> Mapping[str, About]:
        """What the servers last told, by address."""
        return {member.url: member.about for member in self.members() if member.about is not None}

    def add(self, url: str) -> None:
        server = self._connect(url)
        self._members.setdefault(server.url, Member(server))

    def remove(self, url: str) -> None:
        member = self._members.get(url.rstrip("/"))
        if member is not None:
            self._left[member.url] = member
            del self._members[member.url]

    def share(self, rank: int, size: int) -> int:
        """As `Pool.share`; returns how many processes ask each server."""
        assert 0 <= rank < size, (rank, size)
        self._rank, self._size = rank, size
        return -(-size // max(1, len(self)))

    def published(self, version: int, urls: Iterable[str]) -> None:
        """As `Pool.published`."""
        updated = {url.rstrip("/") for url in urls}
        for member in self.members():
            if member.url in updated and member.about is not None:
                member.about = replace(member.about, version=version)
        self.version = version

    def settle_modes(self) -> None:
        """From now on a server must be exact in what those are that may be asked now."""
        told = [self._members[url].about for url in self.usable()]
        modes = [about.modes for about in told if about is not None]
        self.modes = frozenset.intersection(*modes) if modes else STOCK_MODES

    def usable(self) -> tuple[str, ...]:
        """Addresses of servers that may be asked, this process's own first; others only in their stead."""
        members = self.members()
        if self.version is None:
            told = [member.about.version for member in members if member.state == "up" and member.about]
            self.version = max(told, default=None)
        # With more processes than servers the mine are one, which others call theirs too.
        size = min(self._size, max(1, len(members)))
        mine = [i for i in range(len(members)) if i % size == self._rank % size]
        others = [(self._rank + i) % len(members) for i in range(len(members))]
        usable = [members[i].url for i in mine if self._unfit(members[i]) is None]
        return tuple(usable or [members[i].url for i in others if self._unfit(members[i]) is None])

    def complaint(self, patience_s: float) -> UserError | None:
        """Why to give up: all servers refuse, or none could be asked for so long; None: go on."""
        members = self.members()
        if self.usable():
            self._alone_since = None
            return None
        self._alone_since = self._alone_since or time.monotonic()
        waited_s = time.monotonic() - self._alone_since
        refused = bool(members) and all(member.state == "refused" for member in members)
        if not refused and waited_s < patience_s:
            return None
        each = "; ".join(f"{member.url} ({self._unfit(member)})" for member in members) or "none is known"
        return (UserError if refused else ServersLost)(
            f"no rollout server can be asked since {waited_s:.0f} s: {each}; start servers again, or give "
            "others in rollout.urls or rollout.urls_file; the run then goes on from its last checkpoint"
        )

    async def watch(self, every_s: float, wake: asyncio.Event, changed: Callable[[], None]) -> None:
        """Checks each server every so often, and those in doubt as soon as `wake` is set; never returns.

        Args:
            changed: called after each check, and each time the file of addresses was looked at.
        """
        self._alone_since = None
        due: dict[Member, float] = {}
        checks: dict[Member, asyncio.Task[None]] = {}

        async def check(member: Member) -> None:
            lost = await member.check(self.version)
            self.lost += lost  # After the wait: other checks count too.
            del checks[member]
            changed()

        while True:
            wake.clear()
            self.read_urls()
            now = time.monotonic()
            for member in self.members():
                late = due.get(member, now) <= now
                if member not in checks and (late or member.state == "doubted"):
                    due[member] = now + every_s
                    checks[member] = asyncio.ensure_future(check(member))
            changed()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(wake.wait(), every_s)

    def read_urls(self) -> None:
        """Follows the file of addresses; while it cannot be read, all stay."""
        if self._urls_file is None:
            return
        try:
            text = self._urls_file.read_text()
        except OSError:
            return
        if text == self._urls_read:
            return
        before, now = _addresses(self._urls_read), _addresses(text)
        self._urls_read = text
        for url in now - before:
            self.add(url)
        for url in before - now:
            self.remove(url)

    def _unfit(self, member: Member) -> str | None:
        """Why a server may not be asked."""
        if member.state != "up" or member.about is None:
            return f"{member.state}: {member.trouble}"
        if member.about.version != self.version:
            held, wanted = told_version(member.about.version), told_version(self.version)
            return f"it holds weights {held}, not {wanted}"
        lacking = (self.modes or frozenset()) - member.about.modes
        return f"it is not exact in mode {', '.join(sorted(lacking))}" if lacking else None


def _addresses(text: str) -> set[str]:
    lines = (line.strip().rstrip("/") for line in text.splitlines())
    return {line for line in lines if line and not line.startswith("#")}


State = Literal["new", "up", "doubted", "down", "refused"]

# A server that is up may be slow to answer for once.
MISSES = 2


@dataclass(eq=False, slots=True)
class Member:
    """A server of the pool.

    Attributes:
        state: `new` until it has told of itself; `doubted` since a request failed, until it is checked;
            `refused`: it answers, but cannot serve what is promised.
        about: as it last told.
        trouble: what went wrong last.
        misses: checks in a row that failed.
        asks: requests under way, to be given up with the server.
    """

    server: Server
    state: State = "new"
    about: About | None = None
    trouble: str = "it has not answered yet"
    misses: int = 0
    asks: set[asyncio.Task[object]] = field(default_factory=set)

    @property
    def url(self) -> str:
        return self.server.url

    def doubt(self, trouble: str) -> None:
        self.trouble = trouble
        if self.state == "up":
            self.state = "doubted"

    async def check(self, version: int | None) -> bool:
        """Sees how it is.

        Args:
            version: of the weights that it should hold; one that says another is asked again.

        Returns:
            Whether it is lost just now: it was up, and is no more.
        """
        before = self.state
        try:
            if before == "up" and self.about is not None and version in (None, self.about.version):
                if not await self.server.healthy():
                    raise Unreachable(f"{self.url} does not answer its health check")
            else:
                self.about = await self.server.about()
        except Unreachable as error:
            self.trouble = str(error)
            self.misses += 1
            if before == "up" and self.misses < MISSES:
                return False
            self.state = "down"
            for ask in self.asks:
                ask.cancel()
            return before in ("up", "doubted")
        except UserError as error:
            self.trouble = str(error)
            self.state = "refused"
            return before in ("up", "doubted")
        self.state, self.misses = "up", 0
        return False
