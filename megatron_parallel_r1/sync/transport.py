"""What carries buckets of weights to servers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_parallel_r1.sync.buckets import Bucket
from megatron_parallel_r1.sync.control import Control, Facts


@dataclass(frozen=True, slots=True)
class Passed:
    """How a pass went.

    Attributes:
        lost: why a server did not take all, by URL.
        again: whether the servers that are left need a new pass.
    """

    lost: Mapping[str, str]
    again: bool = False


class Transport(Protocol):
    """One way to the servers; the sender alone has it. A pass is `open`, `send` of every bucket, `close`.

    What one server does wrong does not raise; `close` tells it.
    """

    def open(self, servers: Sequence[Control], facts: Mapping[str, Facts], version: int) -> None:
        """Begins a pass.

        Args:
            facts: of each server, by URL, as it gave them just now.
        """
        ...

    def send(self, bucket: Bucket) -> None: ...

    def close(self) -> Passed: ...

    def end(self) -> None:
        """Lets go of what lasts from one pass to the next."""
        ...
