"""A server over HTTP: what goes wrong, said as `Unreachable` (another server may do it) or UserError."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.server import Timeouts, Unreachable

# Said by a server, or a proxy before it, that may do it a little later.
BUSY = frozenset({408, 425, 429})

IDLE_S = 2.0
"""How long an unused connection is kept, in seconds: less than by a server. SGLang's and vLLM's close theirs
after 5 s. So does httpx by default, and a request that is sent in that very moment is lost."""


class Connection:
    """JSON requests to one base address.

    Connections belong to an event loop, and each rollout batch may have its own. So they are opened for the
    loop that asks, and closed when it ends: an async generator that is left unfinished is closed by
    `asyncio.run` before the loop is.

    Args:
        transport: in the place of the network, for tests.
    """

    def __init__(
        self, url: str, timeouts: Timeouts, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        self.url = url.rstrip("/")
        self.timeouts = timeouts
        self._transport = transport
        self._loop: asyncio.AbstractEventLoop | None = None
        self._client: httpx.AsyncClient | None = None
        self._closing: AsyncIterator[httpx.AsyncClient] | None = None

    async def get(self, path: str) -> Any:
        """The JSON answer of a question about the server itself."""
        return await self._json("GET", path, None, self.timeouts.check_s)

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON answer to work that was asked for."""
        return await self._json("POST", path, body, self.timeouts.answer_s)

    async def command(self, path: str, body: Mapping[str, Any]) -> None:
        """As `post`, where the answer says nothing."""
        await self._checked("POST", path, body, self.timeouts.check_s)

    async def answers(self, path: str) -> bool:
        """Whether a GET is answered with success, whatever it says."""
        try:
            await self._checked("GET", path, None, self.timeouts.check_s)
        except (Unreachable, UserError):
            return False
        return True

    async def close(self) -> None:
        closing, self._closing, self._client, self._loop = self._closing, None, None, None
        if closing is not None:
            await closing.aclose()  # type: ignore[attr-defined]

    async def _json(self, method: str, path: str, body: Mapping[str, Any] | None, within_s: float) -> Any:
        answer = await self._checked(method, path, body, within_s)
        try:
            return answer.json()
        except ValueError as error:
            raise Unreachable(f"{self.url}{path}: the answer is no JSON: {answer.text[:200]!r}") from error

    async def _checked(
        self, method: str, path: str, body: Mapping[str, Any] | None, within_s: float
    ) -> httpx.Response:
        client = await self._opened()
        timeout = httpx.Timeout(within_s, connect=min(within_s, self.timeouts.connect_s), pool=None)
        try:
            answer = await client.request(method, self.url + path, json=body, timeout=timeout)
        except httpx.TimeoutException as error:
            raise Unreachable(f"{self.url}{path}: no answer within {within_s:g} s") from error
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise UserError(
                f"{self.url} is no address ({error}); give servers as http://host:port"
            ) from error
        except httpx.TransportError as error:
            raise Unreachable(f"{self.url}{path}: {error or type(error).__name__}") from error
        if answer.is_success:
            return answer
        said = " ".join(answer.text.split())[:400]
        told = f"{self.url}{path} answered {answer.status_code}: {said}"
        if answer.status_code >= 500 or answer.status_code in BUSY:
            raise Unreachable(told)
        raise UserError(f"{told}; change what the recipe asks for, or how the server was started")

    async def _opened(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        if self._client is None or self._loop is not loop:
            self._loop = loop
            limits = httpx.Limits(max_connections=None, keepalive_expiry=IDLE_S)
            self._client = httpx.AsyncClient(transport=self._transport, limits=limits, trust_env=False)
            self._closing = _kept(self._client)
            await self._closing.__anext__()
        return self._client


async def _kept(client: httpx.AsyncClient) -> AsyncIterator[httpx.AsyncClient]:
    try:
        yield client
    finally:
        await client.aclose()
