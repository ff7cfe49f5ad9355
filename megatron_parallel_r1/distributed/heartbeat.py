"""What a rank tells of itself, what a reader has heard of others, and what follows. No thread, no store.

Silence is measured by the reader's own clock since the value last changed: clocks of two machines are never
compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Literal

import torch.distributed as dist

NAMED = 4  # ranks that one line names


@dataclass(frozen=True, slots=True)
class Beat:
    """One sign of life.

    Attributes:
        count: grows with every beat.
        place: where the rank is, in the caller's words, such as `stage rl, step 17`.
        code: the function that its main thread is in, and its line.
        state: `here`; `doubts` once a collective of its own has failed; `left` on its way out.
    """

    count: int
    place: str
    code: str
    state: Literal["here", "doubts", "left"]

    def pack(self) -> str:
        return json.dumps(astuple(self))

    @staticmethod
    def unpack(packed: bytes) -> Beat:
        return Beat(*json.loads(packed))


class Heard:
    """The last beat of each rank that a reader listens to, and since when it has not changed."""

    def __init__(self, ranks: Sequence[int], now: float) -> None:
        self.ranks = tuple(ranks)
        self._packed: dict[int, bytes] = {rank: b"" for rank in ranks}
        self._since: dict[int, float] = {rank: now for rank in ranks}

    def hear(self, packed: Sequence[bytes], now: float) -> None:
        """Takes the stored beats, in the order of the ranks; empty ones have not been written yet."""
        for rank, new in zip(self.ranks, packed, strict=True):
            if new != self._packed[rank]:
                self._packed[rank], self._since[rank] = new, now

    def beat(self, rank: int) -> Beat:
        packed = self._packed[rank]
        return Beat.unpack(packed) if packed else Beat(0, "its start", "no line yet", "here")

    def left(self) -> list[int]:
        return [rank for rank in self.ranks if self.beat(rank).state == "left"]

    def present(self, now: float, patience: float) -> list[int]:
        """The ranks that are neither gone on their own account nor silent for `patience` seconds."""
        here = [rank for rank in self.ranks if self.beat(rank).state != "left"]
        return [rank for rank in here if now - self._since[rank] < patience]

    def silent(self, now: float, patience: float) -> str | None:
        """Names the ranks that have not left and were silent for `patience` seconds; None if none were."""
        silent = [rank for rank, since in self._since.items() if now - since >= patience]
        silent = [rank for rank in silent if self.beat(rank).state != "left"]
        return _listed(
            f"rank {rank} has not been heard of for {now - self._since[rank]:.0f} s, "
            f"it was last in {self.beat(rank).place}"
            for rank in silent
        )

    def astray(self, doubt: str) -> str:
        """Why a collective failed though no rank is silent.

        Args:
            doubt: what the rank says whose collective failed.
        """
        if self.left():
            return f"{doubt}: " + _listed(
                f"rank {rank} has left already, from {self.beat(rank).place}" for rank in self.left()
            )
        working = [rank for rank in self.ranks if self.beat(rank).state == "here"]
        return f"{doubt}; every rank is alive, " + (
            _listed(
                f"rank {rank} is in {self.beat(rank).place}, at {self.beat(rank).code}" for rank in working
            )
            or "and all have failed so"
        )


def failed_collective(error: BaseException) -> bool:
    """Whether torch.distributed raised this. Gloo raises a bare RuntimeError that opens with its own file."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without the source file that gloo puts before it."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line.partition("] ")[2] if line.startswith("[/") else line


def _listed(found: Iterable[str]) -> str | None:
    found = list(found)
    more = [f"and {len(found) - NAMED} more"] if len(found) > NAMED else []
    return "; ".join([*found[:NAMED], *more]) or None
