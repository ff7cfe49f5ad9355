"""The control interface of a rollout server: weights, pauses and memory; and HTTP for its implementations."""

from __future__ import annotations

import json
import select
import ssl
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

import httpx

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.servers.client import KEEPALIVE_S, Unreachable
from megatron_parallel_r1.sync.settings import InFlightPolicy, TransportKind
from megatron_parallel_r1.utils.api_key import bearer, refusal

TokenRow = tuple[int, ...]
RowScores = tuple[float, ...]
MemoryPart = Literal["weights", "kv_cache"]


@dataclass(frozen=True, slots=True)
class WeightsInfo:
    """What a server reports about its weights.

    Attributes:
        version: as the last update named it; None: never updated since its start.
        processes: number of its processes in a broadcast of weights.
        dtype: such as `float32`; None: not reported.
    """

    version: int | None
    processes: int
    dtype: str | None


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where a server joins a process group: the store's address, the group, and the rank of the first of
    this server's processes. `size` includes the sender."""

    address: str
    port: int
    name: str
    backend: str
    size: int
    first: int


class ServerControl(Protocol):
    """One server's control endpoints. Calls on several servers may overlap.

    Every method raises `Unreachable` if there is no answer in time or the server failed, and UserError if it
    refuses.
    """

    @property
    def url(self) -> str: ...

    @property
    def kinds(self) -> frozenset[TransportKind]:
        """Transports by which it takes weights; all but `disk` only if it is a `LiveServerControl`."""

    @property
    def wants_head(self) -> bool:
        """Whether it needs `lm_head.weight` even of a model that ties it to the embedding."""

    def info(self) -> WeightsInfo: ...

    def pause(self, in_flight: InFlightPolicy) -> None:
        """Stops computing, then returns; later requests wait for `continue_generation`."""

    def continue_generation(self) -> None:
        """Ends a pause."""

    def load_folder(self, folder: Path, version: int) -> None:
        """Loads all weights of a folder, and flushes the cache."""

    def score(self, rows: Sequence[TokenRow]) -> list[RowScores]:
        """Natural log-probs at temperature 1 of each row's tokens except the first."""

    def release_memory(self) -> None:
        """Frees the memory of weights and cache until `resume_memory`; the server must be paused."""

    def resume_memory(self, part: MemoryPart) -> None:
        """Allocates memory again, the weights' first; they are undefined then, and the cache is empty."""

    def close(self) -> None:
        """Closes its connections."""


class LiveServerControl(ServerControl, Protocol):
    """A server that takes weights without a file."""

    def join_group(self, rendezvous: Rendezvous) -> None:
        """Joins a process group; returns once all of its processes have joined."""

    def leave_group(self, name: str) -> None:
        """Leaves a process group, if it is a member."""

    def begin_update(self) -> None:
        """Call before the first `receive_broadcast` or `receive_shared`; ends an interrupted update."""

    def receive_broadcast(
        self, names: list[str], dtypes: list[str], shapes: list[list[int]], group: str, version: int | None
    ) -> None:
        """Receives tensors whose bytes the sender broadcasts in one piece, one after another.

        Args:
            version: of all weights after this bucket, which flushes the cache; None: more buckets follow.
        """

    def receive_shared(self, payloads: Sequence[str], version: int | None) -> None:
        """Copies tensors from shared memory.

        Args:
            payloads: one for each of the server's processes.
            version: as in `receive_broadcast`.
        """

    def end_update(self) -> None:
        """Call after the last bucket."""


# An operation may take `timeout_s`; the server's own timeout error comes a little later.
GRACE_S = 30.0
QUICK_S = 20.0


class HttpClient:
    """JSON to and from one server, the base of each engine's control; several threads may use it.

    A publication sends each bucket's message to every server, so a message must cost little: the standard
    library's client costs a quarter of httpx's (docs/cluster.md). It knows no proxies of the environment,
    which are for the outside world, and follows no redirects.

    `timeout_s` is that of an answer, except to `quick` requests, which need no work.
    """

    def __init__(self, url: str, timeout_s: float = 600.0, key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        self._key = key
        self._headers = {"Content-Type": "application/json", "Accept": "application/json", **bearer(key)}
        # Connections, and when each was last used.
        self._idle: list[tuple[HTTPConnection, float]] = []

    def post(self, path: str, body: Mapping[str, Any] | None = None, quick: bool = False) -> Any:
        """The answer's JSON, or its text if it is not JSON."""
        return self._request("POST", path, body or {}, quick)

    def get(self, path: str, quick: bool = False) -> Any:
        return self._request("GET", path, None, quick)

    def close(self) -> None:
        while self._idle:
            self._idle.pop()[0].close()

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None, quick: bool) -> Any:
        content = None if body is None else json.dumps(body).encode()
        try:
            connection = self._connection()
            try:
                assert connection.sock is not None
                connection.sock.settimeout(QUICK_S if quick else self.timeout_s + GRACE_S)
                connection.request(method, path, content, self._headers)
                response = connection.getresponse()
                text = response.read().decode(errors="replace")
            except BaseException:
                connection.close()
                raise
        except (OSError, HTTPException) as error:
            raise Unreachable(f"{self.url}{path}: {error or type(error).__name__}") from error
        if connection.sock is not None:  # else the server closes it after each answer
            self._idle.append((connection, time.monotonic()))
        if response.status >= 500:
            # It may work on another server, or after a restart.
            raise Unreachable(f"{self.url}{path}: {response.status} {_error_text(text)}")
        if response.status >= 300:
            advice = refusal(response.status, self._key)
            raise UserError(f"{self.url}{path} refused: {_error_text(text)}" + (advice and f"; {advice}"))
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return text

    def _connection(self) -> HTTPConnection:
        """A connection that is open, and that the server will not close at this moment."""
        while self._idle:
            connection, used_at = self._idle.pop()
            poll = select.poll()
            poll.register(connection.sock, select.POLLIN)
            # A server that has closed it has sent the end of the stream.
            if time.monotonic() - used_at < KEEPALIVE_S and not poll.poll(0):
                return connection
            connection.close()
        parts = urlsplit(self.url)
        try:
            host, port = parts.hostname or "", parts.port
        except ValueError as error:
            raise UserError(f"{self.url}: {error}; give servers as http://host:port") from None
        if parts.scheme == "https":
            connection = HTTPSConnection(host, port, timeout=QUICK_S, context=_tls())
        else:
            connection = HTTPConnection(host, port, timeout=QUICK_S)
        connection.connect()
        return connection


@cache
def _tls() -> ssl.SSLContext:
    """Certifi's authorities, for some Pythons find none of the system. Loading them takes fifty times as long
    as a request."""
    return httpx.create_ssl_context()


def _error_text(text: str) -> str:
    """An error's text in one line."""
    error: Any = text
    with suppress(json.JSONDecodeError):
        error = json.loads(text)
    if isinstance(error, dict):
        error = error.get("message") or error.get("error") or error.get("detail") or error
    if isinstance(error, dict):
        error = error.get("message") or error
    return " ".join(str(error).split())[:300]
