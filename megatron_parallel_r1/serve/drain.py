"""The end of the server: requests under way get time to finish, the others an error, and no stream is cut."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from socket import socket

import uvicorn

from megatron_parallel_r1.serve.schema import ApiError
from megatron_parallel_r1.serve.session import Session

# Time for the last events to reach clients; connections of those that do not read are then closed.
LINGER_S = 2.0


class Drain:
    """The requests that wait or run, and how they end before the server does."""

    def __init__(self) -> None:
        self._began = False
        self._sessions: set[Session] = set()

    def add(self, session: Session) -> None:
        self._sessions.add(session)
        session.on_end(lambda: self._sessions.discard(session))

    def check(self) -> None:
        """Checks that the server takes requests.

        Raises:
            ApiError: 503; it is ending.
        """
        if self._began:
            raise _ending()

    async def run(self, seconds: float, hurried: Callable[[], bool]) -> None:
        """Takes no more requests; ends those under way with an error after `seconds` or once `hurried`."""
        self._began = True
        end = time.monotonic() + seconds
        if self._sessions and seconds:
            print(
                f"{len(self._sessions)} requests have up to {seconds:g} s to end", file=sys.stderr, flush=True
            )
        while self._sessions and time.monotonic() < end and not hurried():
            await asyncio.sleep(0.05)
        for session in tuple(self._sessions):
            session.fail(_ending())
        end = time.monotonic() + LINGER_S  # an engine's call that never returns must not keep the server
        while self._sessions and time.monotonic() < end:
            await asyncio.sleep(0.01)


class DrainingServer(uvicorn.Server):
    """A server that drains before it ends on SIGTERM or SIGINT; a second SIGINT hurries it.

    Meanwhile it still listens, and refuses requests with 503, `Retry-After`.
    """

    def __init__(self, config: uvicorn.Config, drain: Drain, seconds: float) -> None:
        super().__init__(config)
        self._drain = drain
        self._seconds = seconds

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        await self._drain.run(self._seconds, lambda: self.force_exit)
        asyncio.get_running_loop().call_later(LINGER_S, self._disconnect)
        await super().shutdown(sockets)

    def _disconnect(self) -> None:
        for connection in tuple(self.server_state.connections):
            connection.transport.abort()


def _ending() -> ApiError:
    return ApiError(
        503,
        "the server is ending; send the request to another one, or again once it is back",
        code="shutting_down",
        headers={"Retry-After": "5"},
    )
