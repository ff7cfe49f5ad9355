"""What a rollout server is to the engine and the pool that drive it: one continuation asked, one answered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import httpx

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.engine import Completion, Sampling
from megatron_parallel_r1.rollout.joined_blocks import Joined
from megatron_parallel_r1.thought.layout import Mode

__all__ = [
    "STARTED",
    "STOCK_MODES",
    "About",
    "Answered",
    "Asked",
    "Joined",
    "Server",
    "Timeouts",
    "Unreachable",
]

STARTED = -1
"""Version of the weights that a server was started with, which no update has named. Not 0: that is the first
one of a stage, and a server that comes back with other weights must not be taken for it."""

STOCK_MODES: frozenset[Mode] = frozenset({"replay", "causal", "sequential"})
"""Modes that any server serves exactly that continues a token list and can bar a token."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long a server is waited for, in seconds.

    Attributes:
        connect_s: until a connection stands.
        answer_s: until a continuation or a score is there.
        check_s: until it says of itself.
    """

    connect_s: float = 10.0
    answer_s: float = 1800.0
    check_s: float = 20.0


@dataclass(frozen=True, slots=True)
class Asked:
    """One continuation.

    Attributes:
        tokens: all that the next token follows, flat; at least one.
        sampling, limit, stop, suppress: as in `base.Engine.sample`.
        trace: a name that all continuations of one trace share; they go to one server while it lives.
        joined: closed blocks in `tokens` that are isolated, in order of their forks, those inside a path of
            another one included; only a server that tells of mode `isolated` takes any.
    """

    tokens: tuple[int, ...]
    sampling: Sampling
    limit: int
    stop: frozenset[int]
    suppress: frozenset[int]
    trace: str
    joined: tuple[Joined, ...] = ()


@dataclass(frozen=True, slots=True)
class Answered:
    """What came back.

    Attributes:
        completion: as `base.Engine.sample` gives it.
        cached_tokens: how many of the asked tokens the server had in its cache; 0 where it does not say.
    """

    completion: Completion
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class About:
    """What a server says of itself.

    Attributes:
        model: the folder that it was started with.
        modes: in which its log-probs are exact; `isolated` only if it answered the plugin's handshake.
        version: of its weights, as the last update named it; `STARTED` before any.
        max_tokens: prompt and continuation of one request together.
        cache_tokens: of its key/value cache; None: it does not say.
        seeded: a draw is fixed by its seed: asked for the same twice, it drew the same.
        copies: of the model in an SGLang server, data-parallel ones.
    """

    model: str
    modes: frozenset[Mode]
    version: int
    max_tokens: int
    cache_tokens: int | None
    seeded: bool = True
    copies: int = 1


class Server(Protocol):
    """One server. Every method raises `Unreachable` if there is no (whole) answer in time, and UserError if
    the server refuses what it was asked. A server may be used in one event loop after another."""

    @property
    def url(self) -> str:
        """Base address, as `http://host:port`."""
        ...

    async def about(self) -> About: ...

    async def healthy(self) -> bool:
        """Whether it answers at all; never raises."""
        ...

    async def generate(self, asked: Asked) -> Answered: ...

    async def score(self, tokens: tuple[int, ...]) -> tuple[float, ...]:
        """Natural log-probs of tokens[1:] at temperature 1, each given those before it."""
        ...

    async def abort_all(self) -> None:
        """Ends all requests under way; whoever waits for one gets `Unreachable`."""
        ...

    async def close(self) -> None:
        """Gives its connections back; the end of the event loop does it too."""
        ...


class Unreachable(Exception):
    """A server gave no answer, or broke off; another one may give it."""


def version_of(name: object) -> int:
    """The number of a server's weight version; `STARTED` where no update has named one yet ("default")."""
    return int(name) if isinstance(name, (int, str)) and str(name).isdigit() else STARTED


def told_version(version: int | None) -> str:
    """For messages."""
    return "as it was started" if version == STARTED else str(version)


def versions_of(spans: object, count: int, otherwise: int) -> tuple[int, ...]:
    """Of each of `count` drawn tokens, the weights that drew it.

    Args:
        spans: as both engines send them: `{version, start, end}` in order; None where they do not say.
        otherwise: for tokens that no span covers.
    """
    versions = [otherwise] * count
    for span in spans if isinstance(spans, list) else []:
        start, end = int(span["start"]), min(int(span["end"]), count)
        versions[start:end] = [version_of(span["version"])] * max(0, end - start)
    return tuple(versions)


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
