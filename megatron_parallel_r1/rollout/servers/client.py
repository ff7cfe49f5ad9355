"""The client interface of a rollout server: requests, results, and the HTTP connection beneath them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.engine import Completion, Sampling
from megatron_parallel_r1.rollout.joined_blocks import JoinedBlock
from megatron_parallel_r1.thought.layout import Mode
from megatron_parallel_r1.utils.api_key import bearer, refusal

INITIAL_VERSION = -1
"""Version of the weights that a server was started with, before any update. Not 0: that is the first version
of a stage, and a server that restarts with other weights must not be taken for it."""

STOCK_MODES: frozenset[Mode] = frozenset({"replay", "causal", "sequential"})
"""Modes served exactly by any server that continues a token list and can suppress a token."""

NEUTRAL = {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""Sent with every request: a server may have other defaults (SGLang's `--preferred-sampling-params`, the
model's generation_config.json), and tokens would be drawn from another distribution than they are trained
under."""

# Added to a suppressed logit. Its probability is then exactly 0 in float32 at any temperature below 10^6.
SUPPRESSED_BIAS = -1e9


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Timeouts of a server, in seconds: to connect, of a continuation or score, of checks and information."""

    connect_s: float = 10.0
    answer_s: float = 1800.0
    check_s: float = 20.0


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One continuation.

    Attributes:
        tokens: all tokens before the next one, flat; at least one.
        sampling, limit, stop, suppress: see `rollout.engine.Engine.sample`.
        trace: a name that all requests of one trace share; they go to one server while it is up.
        joined: the closed isolated blocks in `tokens`, nested ones included, in order of their forks; only
            for servers with mode `isolated`.
        experts_from: index of the first token whose experts are returned; None: none are.
    """

    tokens: tuple[int, ...]
    sampling: Sampling
    limit: int
    stop: frozenset[int]
    suppress: frozenset[int]
    trace: str
    joined: tuple[JoinedBlock, ...] = ()
    experts_from: int | None = None

    def logit_bias(self) -> dict[str, dict[str, float]]:
        """The field of a request's parameters that suppresses tokens, if there are any."""
        bias = {str(token): SUPPRESSED_BIAS for token in sorted(self.suppress)}
        return {"logit_bias": bias} if bias else {}


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """The result of a `GenerateRequest`.

    Attributes:
        cached_tokens: how many of the request's tokens were in the server's cache; 0 if not reported.
        experts: of all tokens from `experts_from` on but the last one drawn: int16, by token, layer and
            choice.
    """

    completion: Completion
    cached_tokens: int
    experts: bytes = b""


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a server reports about itself.

    Attributes:
        model: the folder that it was started with.
        modes: in which its log-probs are exact; `isolated` only with the plugin.
        version: of its weights, as the last update named it; `INITIAL_VERSION` before any.
        max_tokens: prompt and continuation of one request together.
        cache_tokens: size of its KV cache; None: not reported.
        seeded: whether the seed fixes a draw: the same request, sent twice, drew the same tokens.
        copies, nodes: of an SGLang server, data-parallel copies of the model, and machines that it is on.
        nccl: version of its NCCL; None: not reported.
        experts: whether it can return the experts that it chose.
    """

    model: str
    modes: frozenset[Mode]
    version: int
    max_tokens: int
    cache_tokens: int | None
    seeded: bool = True
    copies: int = 1
    nodes: int = 1
    nccl: tuple[int, ...] | None = None
    experts: bool = False


class Server(Protocol):
    """A client of one server. Every method raises `Unreachable` if no complete answer comes in time, and
    UserError if the server refuses. Use it in one event loop after another, one at a time."""

    @property
    def url(self) -> str:
        """Base address, as `http://host:port`."""

    async def info(self) -> ServerInfo: ...

    async def healthy(self) -> bool:
        """Whether it answers at all; never raises."""

    async def generate(self, request: GenerateRequest) -> GenerateResult: ...

    async def score(self, tokens: tuple[int, ...]) -> tuple[float, ...]:
        """Natural log-probs of tokens[1:] at temperature 1, each given the tokens before it."""

    async def abort_all(self) -> None:
        """Aborts all requests under way; they raise `Unreachable`."""

    async def close(self) -> None:
        """Closes its connections; so does the end of the event loop."""


class Unreachable(Exception):
    """A server gave no complete answer; another server may."""


def parse_version(name: object) -> int:
    """The number of a server's weight version; `INITIAL_VERSION` if no update has named one ("default")."""
    return int(name) if isinstance(name, (int, str)) and str(name).isdigit() else INITIAL_VERSION


def describe_version(version: int | None) -> str:
    """For messages."""
    return "as started" if version == INITIAL_VERSION else str(version)


def token_versions(spans: object, count: int, otherwise: int) -> tuple[int, ...]:
    """The weight version that drew each of `count` tokens.

    Args:
        spans: as both engines send them, `{version, start, end}` in order; None if not reported.
        otherwise: for tokens that no span covers.
    """
    versions = [otherwise] * count
    for span in spans if isinstance(spans, list) else []:
        start, end = int(span["start"]), min(int(span["end"]), count)
        versions[start:end] = [parse_version(span["version"])] * max(0, end - start)
    return tuple(versions)


# Statuses of a server, or a proxy before it, that may succeed a little later.
RETRYABLE_STATUSES = frozenset({408, 425, 429})

KEEPALIVE_S = 2.0
"""How long an unused connection is kept, in seconds: less than servers do. SGLang and vLLM close theirs after
5 s, and a request sent at that very moment is lost."""


class AsyncHttpClient:
    """JSON requests to one base address; the base of each engine's `Server`.

    A request costs the same however many are in flight: see `benchmarks/client.py`.

    Connections belong to an event loop, and each rollout batch may have its own. They are opened in the
    running loop and closed when it ends: `asyncio.run` closes an unfinished async generator before the loop.
    """

    def __init__(self, url: str, timeouts: Timeouts | None = None, key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self.timeouts = timeouts or Timeouts()
        self._key = key
        self._seeded: bool | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._session: aiohttp.ClientSession | None = None
        self._closer: AsyncGenerator[None, None] | None = None

    async def get(self, path: str) -> Any:
        """The JSON answer to a question about the server; times out after `check_s`."""
        return await self._json("GET", path, None, self.timeouts.check_s)

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON answer to a request for work; times out after `answer_s`."""
        return await self._json("POST", path, body, self.timeouts.answer_s)

    async def command(self, path: str, body: Mapping[str, Any]) -> None:
        """Posts and ignores the answer's content; times out after `check_s`."""
        await self._checked("POST", path, body, self.timeouts.check_s)

    async def healthy(self) -> bool:
        try:
            await self._checked("GET", "/health", None, self.timeouts.check_s)
        except (Unreachable, UserError):
            return False
        return True

    async def close(self) -> None:
        closer, self._closer, self._session, self._loop = self._closer, None, None, None
        if closer is not None:
            await closer.aclose()

    async def _json(self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float) -> Any:
        content = await self._checked(method, path, body, timeout_s)
        try:
            return json.loads(content)
        except ValueError as error:
            text = content[:200].decode(errors="replace")
            raise Unreachable(f"{self.url}{path}: the answer is no JSON: {text!r}") from error

    async def _checked(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float
    ) -> bytes:
        """The body of a successful answer."""
        session = await self._open()
        connect_s = min(timeout_s, self.timeouts.connect_s)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_s, sock_read=timeout_s)
        try:
            async with session.request(
                method, self.url + path, json=body, timeout=timeout, allow_redirects=False
            ) as response:
                content = await response.read()
        except asyncio.TimeoutError as error:
            raise Unreachable(f"{self.url}{path}: no answer within {timeout_s:g} s") from error
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError) as error:
            raise UserError(
                f"{self.url} is no address ({error}); give servers as http://host:port"
            ) from error
        except aiohttp.ClientError as error:
            raise Unreachable(f"{self.url}{path}: {error or type(error).__name__}") from error
        if 200 <= response.status < 300:
            return content
        text = " ".join(content.decode(errors="replace").split())[:400]
        message = f"{self.url}{path} answered {response.status}: {text}"
        if response.status >= 500 or response.status in RETRYABLE_STATUSES:
            raise Unreachable(message)
        advice = refusal(response.status, self._key) or "change the recipe, or how the server was started"
        raise UserError(f"{message}; {advice}")

    async def _open(self) -> aiohttp.ClientSession:
        loop = asyncio.get_running_loop()
        if self._session is None or self._loop is not loop:
            self._loop = loop
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S)
            self._session = aiohttp.ClientSession(
                connector=connector, cookie_jar=aiohttp.DummyCookieJar(), headers=bearer(self._key)
            )
            self._closer = _closed_at_exit(self._session)
            await self._closer.__anext__()
        return self._session


async def _closed_at_exit(session: aiohttp.ClientSession) -> AsyncGenerator[None, None]:
    try:
        yield
    finally:
        await session.close()


# The highest temperature that vLLM takes. There a language model hardly draws the same HANDSHAKE_TOKENS twice
# by chance.
HANDSHAKE_TEMPERATURE = 2.0
HANDSHAKE_TOKENS = 32
# First tokens that are drawn to compare their log-probs at two temperatures.
HANDSHAKE_DRAWS = 16


async def draws_by_seed(server: Server) -> bool:
    """Whether a server draws the same tokens for the same seed; checks that its log-probs are as required.

    Both are measured: the settings that change them have other names in each engine and version.

    Raises:
        UserError: the log-probs leave the temperature out.
        Unreachable: no answer.
    """
    whole = _handshake(seed=0, limit=HANDSHAKE_TOKENS)
    first, second, *draws = await asyncio.gather(
        server.generate(whole),
        server.generate(whole),
        *(server.generate(_handshake(seed, limit=1)) for seed in range(1, HANDSHAKE_DRAWS + 1)),
    )
    hot = {draw.completion.tokens[0]: draw.completion.logprobs[0] for draw in draws}
    scores = await asyncio.gather(*(server.score((*whole.tokens, token)) for token in hot))
    if _slope([score[0] for score in scores], list(hot.values())) > (1 + 1 / HANDSHAKE_TEMPERATURE) / 2:
        raise UserError(
            f"{server.url} returns log-probs that leave the temperature out; start vLLM with "
            "--logprobs-mode processed_logprobs, SGLang without SGLANG_RETURN_ORIGINAL_LOGPROB"
        )
    return first.completion.tokens == second.completion.tokens


def _handshake(seed: int, limit: int) -> GenerateRequest:
    sampling = Sampling(temperature=HANDSHAKE_TEMPERATURE, seed=20250909 + seed)
    return GenerateRequest((0,), sampling, limit, frozenset(), frozenset(), "handshake")


def _slope(cold: Sequence[float], hot: Sequence[float]) -> float:
    """The slope of the line nearest to log-probs at temperature T over those at 1, of tokens in one context.

    Two tokens' log-probs at T differ by 1/T of their difference at 1, whatever the distribution. The slope is
    therefore 1/T, or 1 where T is left out; rounding moves it by its own size relative to the logits'
    spread, in bfloat16 by some hundredths. 0 if all log-probs are the same.
    """
    middle = sum(cold) / len(cold)
    spread = sum((value - middle) ** 2 for value in cold)
    return sum((c - middle) * h for c, h in zip(cold, hot, strict=True)) / spread if spread else 0.0
