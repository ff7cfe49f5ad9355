"""How weights travel to rollout servers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_parallel_r1.utils.settings import Bytes, Count, Settings, Unit

TransportKind = Literal["distributed", "tensor", "disk"]
InFlightPolicy = Literal["finish", "retract", "abort"]


class Sync(Settings):
    """How the trainer's weights travel to rollout servers."""

    transport: TransportKind = "distributed"
    """`distributed`: broadcast over a process group that the servers join; `tensor`: memory shared with
    servers on the sender's node; `disk`: a folder that the trainer and all servers see."""
    bucket_bytes: Bytes = 512 * 2**20
    """Weights sent together; a larger parameter is sent alone."""
    in_flight: InFlightPolicy = "finish"
    """Requests that are running: `finish`: they end first; `retract`: they pause, then continue with the new
    weights and a recomputed cache; `abort`: they end at once."""
    tolerance: Annotated[float, Field(gt=0), Unit("nats")] | None = None
    """Largest difference between a server's log-probs and the trainer's; null: what rounding explains in the
    coarser of their dtypes, by the number of layers and the size of the log-probs, 2e-5 at least."""
    timeout_s: Annotated[float, Field(ge=1), Unit("seconds")] = 600.0
    """Timeout of one operation: a bucket received, or all running requests ended."""
    backend: Literal["nccl", "gloo"] | None = None
    """Backend of the broadcast; null: nccl where the trainer's weights are on GPUs, else gloo."""
    address: str | None = None
    """Address at which servers reach the sender; null: that of the route to the first server."""
    folder: Path | None = None
    """Folder that `disk` writes to; with it, `distributed` becomes `disk` where NCCL's versions differ."""
    keep: Count = 2
    """Versions that `disk` keeps in its folder."""

    @model_validator(mode="after")
    def _check_folder(self) -> Sync:
        if self.transport == "disk" and self.folder is None:
            raise ValueError("transport disk needs a folder that the trainer and all servers see")
        return self
