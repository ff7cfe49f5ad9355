"""How weights travel to rollout servers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

Kind = Literal["distributed", "tensor", "disk"]
InFlight = Literal["finish", "retract", "abort"]


@dataclass(frozen=True, slots=True)
class Sync:
    """How a trainer's weights travel to rollout servers.

    Attributes:
        transport: `distributed`, a broadcast over a process group that the servers join; `tensor`, memory
            shared with servers on the sender's node; `disk`, a folder on a path that all of them see.
        bucket_bytes: of weights that are brought together at a time; a larger parameter is one of its own.
        in_flight: what becomes of requests under way: `finish`, they end first; `retract`, they wait and go
            on under the new weights, what they had in the cache computed anew; `abort`, they end as they are.
        tolerance: the largest difference in nats between a server's log-probs and the trainer's. The default
            is for float32; bfloat16 rounds at 2^-9, and 0.1 is a good start there.
        timeout_s: of one step: one bucket taken, all requests under way ended.
        backend: of the broadcast; None: nccl where the trainer's weights are on GPUs, else gloo.
        address: under which servers reach the sender; None: that of the way from here to the first of them.
        folder: where `disk` writes.
        keep: folders of versions that `disk` leaves there.
    """

    # For pydantic, which reads these settings from a recipe: an unknown key is an error.
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    transport: Kind = "distributed"
    bucket_bytes: int = 512 * 2**20
    in_flight: InFlight = "finish"
    tolerance: float = 2e-5
    timeout_s: float = 600.0
    backend: Literal["nccl", "gloo"] | None = None
    address: str | None = None
    folder: Path | None = None
    keep: int = 2

    def __post_init__(self) -> None:
        broken = [
            f"{name} must be >= 1"
            for name in ("bucket_bytes", "timeout_s", "keep")
            if getattr(self, name) < 1
        ]
        if not self.tolerance > 0:
            broken.append("tolerance must be > 0")
        if self.transport == "disk" and self.folder is None:
            broken.append("transport disk needs a folder that the trainer and all servers see")
        if broken:
            raise ValueError("; ".join(broken))
