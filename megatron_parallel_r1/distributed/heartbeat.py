"""A rank's heartbeat, and what a monitor concludes from the others'. No thread, no store.

Silence is measured by the monitor's own clock since the value last changed: the clocks of two machines are
never compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Literal

import torch.distributed as dist

State = Literal["here", "doubts", "left"]
MAX_NAMED = 4  # ranks that one message names


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """One sign of life.

    Attributes:
        count: grows with every heartbeat.
        location: where the rank is, in the caller's words, such as `stage rl, step 17`.
        code: the function that its main thread is in, with file and line.
        state: `here`; `doubts` once one of its collectives has failed; `left` on its way out.
    """

    count: int
    location: str
    code: str
    state: State

    def pack(self) -> str:
        return json.dumps(astuple(self))

    @staticmethod
    def unpack(packed: bytes) -> Heartbeat:
        return Heartbeat(*json.loads(packed))


class HeartbeatMonitor:
    """The last heartbeat of each monitored rank, and since when it has not changed."""

    def __init__(self, ranks: Sequence[int], now: float) -> None:
        self.ranks = tuple(ranks)
        self._packed: dict[int, bytes] = {rank: b"" for rank in ranks}
        self._since: dict[int, float] = {rank: now for rank in ranks}

    def update(self, packed: Sequence[bytes], now: float) -> None:
        """Takes the stored heartbeats, in the order of the ranks; an empty one has not been written yet."""
        for rank, new in zip(self.ranks, packed, strict=True):
            if new != self._packed[rank]:
                self._packed[rank], self._since[rank] = new, now

    def last(self, rank: int) -> Heartbeat:
        packed = self._packed[rank]
        return Heartbeat.unpack(packed) if packed else Heartbeat(0, "its start", "no line yet", "here")

    def left(self) -> list[int]:
        return [rank for rank in self.ranks if self.last(rank).state == "left"]

    def present(self, now: float, timeout_s: float) -> list[int]:
        """Returns the ranks that have neither left nor been silent for `timeout_s`."""
        here = [rank for rank in self.ranks if self.last(rank).state != "left"]
        return [rank for rank in here if now - self._since[rank] < timeout_s]

    def describe_silent(self, now: float, timeout_s: float) -> str | None:
        """Names the ranks that have not left and were silent for `timeout_s`; None if there are none."""
        silent = [rank for rank, since in self._since.items() if now - since >= timeout_s]
        silent = [rank for rank in silent if self.last(rank).state != "left"]
        return _join(
            f"rank {rank} has sent no heartbeat for {now - self._since[rank]:.0f} s, "
            f"it was last in {self.last(rank).location}"
            for rank in silent
        )

    def explain_failure(self, failure: str) -> str:
        """Explains a rank's failed collective, with message `failure`, although no rank is silent."""
        if self.left():
            return f"{failure}: " + (
                _join(
                    f"rank {rank} has left already, from {self.last(rank).location}" for rank in self.left()
                )
                or ""
            )
        working = [rank for rank in self.ranks if self.last(rank).state == "here"]
        return f"{failure}; every rank is alive, " + (
            _join(
                f"rank {rank} is in {self.last(rank).location}, at {self.last(rank).code}" for rank in working
            )
            or "and on all of them a collective failed"
        )


def is_collective_error(error: BaseException) -> bool:
    """Returns whether torch.distributed raised it. Gloo's are bare RuntimeErrors that begin with its file."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, without the source file that gloo puts before it."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line.partition("] ")[2] if line.startswith("[/") else line


def _join(descriptions: Iterable[str]) -> str | None:
    descriptions = list(descriptions)
    more = [f"and {len(descriptions) - MAX_NAMED} more"] if len(descriptions) > MAX_NAMED else []
    return "; ".join([*descriptions[:MAX_NAMED], *more]) or None
