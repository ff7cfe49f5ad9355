"""What a rollout server lets its trainer do, apart from drawing tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import httpx

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.servers.client import KEEPALIVE_S, Unreachable
from megatron_parallel_r1.sync.settings import InFlightPolicy, TransportKind

TokenRow = tuple[int, ...]
RowScores = tuple[float, ...]
MemoryPart = Literal["weights", "kv_cache"]


@dataclass(frozen=True, slots=True)
class WeightsInfo:
    """What a server says of itself.

    Attributes:
        version: of its weights as the last update named it; None: it was started and never updated.
        processes: that take part in a broadcast of weights.
        dtype: of its weights, as `float32`; None: it does not say.
    """

    version: int | None
    processes: int
    dtype: str | None


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where a process group comes together.

    Attributes:
        address, port: of the store.
        name: of the group.
        backend: nccl or gloo.
        size: of the group, sender included.
        first: rank of the first of this server's processes.
    """

    address: str
    port: int
    name: str
    backend: str
    size: int
    first: int


class ServerControl(Protocol):
    """One server's control endpoints. Calls on several servers may overlap.

    Every method raises `rollout.server.Unreachable` if there is no answer in time or the server failed, and
    UserError if it refuses.
    """

    @property
    def url(self) -> str:
        """Base address, as `http://host:port`."""
        ...

    @property
    def kinds(self) -> frozenset[TransportKind]:
        """The transports by which it takes weights; all but `disk` only if it is a `LiveServerControl`."""
        ...

    @property
    def wants_head(self) -> bool:
        """Whether it needs `lm_head.weight` even of a model that ties it to the embedding."""
        ...

    def facts(self) -> WeightsInfo: ...

    def pause(self, in_flight: InFlightPolicy) -> None:
        """Stops computing, then returns; later requests wait for `continue_generation`."""
        ...

    def continue_generation(self) -> None:
        """Ends a pause."""
        ...

    def load(self, folder: Path, version: int) -> None:
        """Takes all weights of a folder, and forgets what the old ones left in the cache."""
        ...

    def score(self, rows: Sequence[TokenRow]) -> list[RowScores]:
        """Natural log-probs at temperature 1 of each row's tokens but the first."""
        ...

    def release_memory(self) -> None:
        """Gives the memory of weights and cache back until `resume_memory`; the server is paused."""
        ...

    def resume_memory(self, part: MemoryPart) -> None:
        """Takes memory again, the weights' first; what they are is undefined then, and the cache is empty."""
        ...

    def close(self) -> None:
        """Gives its connections back."""
        ...


class LiveServerControl(ServerControl, Protocol):
    """A server that takes weights without a file."""

    def join(self, meeting: Rendezvous) -> None:
        """Joins a process group; returns when all of its processes have come."""
        ...

    def leave(self, name: str) -> None:
        """Leaves a process group, if it is in it."""
        ...

    def begin(self) -> None:
        """Before the first of `take_broadcast` or `take_tensors`; ends an update that broke off."""
        ...

    def take_broadcast(
        self, names: list[str], dtypes: list[str], shapes: list[list[int]], group: str, version: int | None
    ) -> None:
        """Takes tensors that the sender broadcasts one by one.

        Args:
            version: of all weights once these are taken, and the cache is flushed; None: more will come.
        """
        ...

    def take_tensors(self, payloads: Sequence[str], version: int | None) -> None:
        """Takes tensors that lie in shared memory.

        Args:
            payloads: for each of the server's processes.
            version: as in `take_broadcast`.
        """
        ...

    def end(self) -> None:
        """After the last of them."""
        ...


# A step may take `timeout_s`; what the server says when it did not end comes later.
GRACE_S = 30.0
QUICK_S = 20.0


class HttpClient:
    """JSON to and from one server; several threads may use it.

    Args:
        url: base address.
        timeout_s: how long an answer may take, but of `quick` questions, which need no work.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        # A proxy of the environment is for the world outside, not for servers of the cluster.
        limits = httpx.Limits(keepalive_expiry=KEEPALIVE_S)
        self._client = httpx.Client(base_url=self.url, limits=limits, trust_env=False)

    def post(self, path: str, body: Mapping[str, Any] | None = None, quick: bool = False) -> Any:
        """The answer's JSON, or its text if it is none."""
        return self._ask("POST", path, body or {}, quick)

    def get(self, path: str, quick: bool = False) -> Any:
        return self._ask("GET", path, None, quick)

    def close(self) -> None:
        self._client.close()

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None, quick: bool) -> Any:
        timeout = httpx.Timeout(QUICK_S if quick else self.timeout_s + GRACE_S, connect=QUICK_S)
        try:
            reply = self._client.request(method, path, json=body, timeout=timeout)
        except httpx.HTTPError as error:
            raise Unreachable(f"{self.url}{path}: {error or type(error).__name__}") from error
        if reply.status_code >= 500:
            # What broke inside may work on another server, or after a restart.
            raise Unreachable(f"{self.url}{path}: {reply.status_code} {_said(reply)}")
        if reply.status_code >= 400:
            raise UserError(f"{self.url}{path} refused: {_said(reply)}")
        try:
            return reply.json()
        except json.JSONDecodeError:
            return reply.text


def _said(reply: httpx.Response) -> str:
    """An error's text in one line."""
    try:
        told = reply.json()
    except json.JSONDecodeError:
        told = reply.text
    if isinstance(told, dict):
        told = told.get("message") or told.get("error") or told.get("detail") or told
    if isinstance(told, dict):
        told = told.get("message") or told
    return " ".join(str(told).split())[:300]
