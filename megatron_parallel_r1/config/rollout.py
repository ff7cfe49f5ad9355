"""Who draws the tokens of a run's rollouts and evaluations, as a recipe says it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_parallel_r1.config.data import Count, Strict
from megatron_parallel_r1.sync.settings import Sync

Url = Annotated[str, Field(pattern=r"^https?://[^/\s]+$")]
Seconds = Annotated[float, Field(gt=0)]


class Rollout(Strict):
    """The engine in the training processes (`native`), or servers.

    Servers run already, at `urls` or at those that `urls_file` names, one a line; or the run starts so many
    (`servers`) beside its first process and ends them when it ends.

    Attributes:
        compiled: the native engine's layers go through torch.compile.
        urls_file: as `parallel-r1 serve-rollout --urls-file` writes it; read again while the run goes on, so
            that servers may join and leave.
        tensor: processes (GPUs) of each server that the run starts.
        memory_share: of a GPU's memory, for the weights and the cache of a server that the run starts.
        colocated: the servers give their memory back while the trainer learns.
        max_concurrent_requests: requests to one server at a time.
        request_timeout_s: a request without an answer by then goes to another server.
        patience_s: how long the run waits for a server when none is left, then it ends; what it saved stays.
        sync: how weights travel.
    """

    engine: Literal["native", "sglang", "vllm"] = "native"
    compiled: bool = False
    urls: tuple[Url, ...] = ()
    urls_file: Path | None = None
    servers: Annotated[int, Field(ge=0)] = 0
    tensor: Count = 1
    memory_share: Annotated[float, Field(gt=0, le=1)] | None = None
    colocated: bool = False
    max_concurrent_requests: Count = 128
    request_timeout_s: Seconds = 600.0
    patience_s: Seconds = 300.0
    sync: Sync = Sync()

    @model_validator(mode="after")
    def _consistent(self) -> Rollout:
        ways = [name for name in ("urls", "urls_file", "servers") if getattr(self, name)]
        if self.engine == "native":
            if ways:
                raise ValueError(
                    f"{ways[0]}: the native engine needs no servers; set engine to sglang or vllm"
                )
            return self
        if self.compiled:
            raise ValueError(f"compiled: only the native engine's layers; {self.engine} has its own settings")
        if len(ways) != 1:
            raise ValueError(
                f"engine {self.engine} needs servers: give urls, urls_file, or servers (so many are started)"
            )
        if self.colocated and not self.servers:
            raise ValueError("colocated: only for servers that the run starts beside itself (`servers`)")
        if self.engine == "vllm" and self.sync.transport != "disk":
            raise ValueError(
                "vllm takes new weights from disk only; set sync.transport to disk, with sync.folder"
            )
        return self
