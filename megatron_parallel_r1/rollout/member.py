"""One server as the pool knows it: what it last said of itself, and whether it may be asked."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Literal

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.server import About, Server, Unreachable

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
