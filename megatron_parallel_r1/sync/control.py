"""What a rollout server lets its trainer do, apart from drawing tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from megatron_parallel_r1.sync.settings import InFlight, Kind

Row = tuple[int, ...]
Scores = tuple[float, ...]
Memory = Literal["weights", "kv_cache"]


@dataclass(frozen=True, slots=True)
class Facts:
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
class Meeting:
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


class Control(Protocol):
    """One server's control endpoints. Calls on several servers may overlap.

    Every method raises `rollout.server.Unreachable` if there is no answer in time or the server failed, and
    UserError if it refuses.
    """

    @property
    def url(self) -> str:
        """Base address, as `http://host:port`."""
        ...

    @property
    def kinds(self) -> frozenset[Kind]:
        """The transports by which it takes weights; all but `disk` only if it is a `LiveControl`."""
        ...

    @property
    def wants_head(self) -> bool:
        """Whether it needs `lm_head.weight` even of a model that ties it to the embedding."""
        ...

    def facts(self) -> Facts: ...

    def pause(self, in_flight: InFlight) -> None:
        """Returns when nothing is computed any more; requests that come later wait for `proceed`."""
        ...

    def proceed(self) -> None:
        """Ends a pause."""
        ...

    def load(self, folder: Path, version: int) -> None:
        """Takes all weights of a folder, and forgets what the old ones left in the cache."""
        ...

    def score(self, rows: Sequence[Row]) -> list[Scores]:
        """Natural log-probs at temperature 1 of each row's tokens but the first."""
        ...

    def release_memory(self) -> None:
        """Gives the memory of weights and cache back until `resume_memory`; the server is paused."""
        ...

    def resume_memory(self, part: Memory) -> None:
        """Takes memory again, the weights' first; what they are is undefined then, and the cache is empty."""
        ...

    def close(self) -> None:
        """Gives its connections back."""
        ...


class LiveControl(Control, Protocol):
    """A server that takes weights without a file."""

    def join(self, meeting: Meeting) -> None:
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
