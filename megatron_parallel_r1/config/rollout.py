"""The engine that samples the responses of a run's rollouts and evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.sync.settings import Sync
from megatron_parallel_r1.utils.api_key import read_key
from megatron_parallel_r1.utils.settings import Count, CountOrZero, Ranks, Seconds, Settings

Url = Annotated[str, Field(pattern=r"^https?://[^/\s]+$")]


class Rollout(Settings):
    """The engine in the training processes (`native`), or servers.

    Servers are given by `urls` or `urls_file`, or the run starts `servers` of them beside its first process
    and stops them when it ends.
    """

    engine: Literal["native", "sglang", "vllm"] = "native"
    """Inference engine; `native` runs in the training processes."""
    compiled: bool = False
    """Compile the native engine's layers with torch.compile."""
    urls: tuple[Url, ...] = ()
    """Base URLs of running servers."""
    urls_file: Path | None = None
    """File with one base URL a line, as `parallel-r1 serve-rollout --urls-file` writes it; it is read again
    during the run, so that servers may join and leave."""
    router: Url | None = None
    """Address of a router before the servers of `urls` or `urls_file`, such as sglang-router: requests go to
    it, weights and health checks to the servers."""
    servers: CountOrZero = 0
    """Number of servers that the run starts: on GPUs of the first node that no rank has, or `colocated` on
    each node."""
    tensor: Ranks = 1
    """Tensor-parallel size of each server that the run starts."""
    memory_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of a GPU's memory for weights and cache of a server that the run starts; null: the engine's
    default."""
    deterministic: bool = True
    """Of servers that the run starts: kernels whose results do not depend on the batch, and draws fixed by
    their seeds. false is faster on GPUs and costs exactness: log-probs of server and trainer differ more, and
    neither a repeated or resumed run nor a request that is sent again draws the same traces."""
    colocated: bool = False
    """Servers share the ranks' GPUs: servers release their memory while the trainer learns, and the trainer
    that of gradients and optimizer while they draw. On GPUs it needs `sync.transport` tensor or disk."""
    key_variable: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    """Environment variable with the servers' API key, on every rank; also of servers that the run starts."""
    key_file: Path | None = None
    """File with the servers' API key, instead of `key_variable`."""
    max_concurrent_requests: Count = 128
    """Most requests in flight to one server."""
    request_timeout_s: Seconds = 600.0
    """Timeout after which a request is sent to another server."""
    patience_s: Seconds = 300.0
    """How long the run waits for a server when none is left before it ends; what it saved is kept."""
    sync: Sync = Sync()
    """How the trainer's weights travel to the servers."""

    @model_validator(mode="after")
    def _check_servers(self) -> Rollout:
        ways = [name for name in ("urls", "urls_file", "servers") if getattr(self, name)]
        if self.engine == "native":
            ways += ["router"] if self.router else []
            if ways:
                raise ValueError(
                    f"{ways[0]}: the native engine needs no servers; set engine to sglang or vllm"
                )
            return self
        if self.compiled:
            raise ValueError(f"compiled: only the native engine's layers; {self.engine} has its own settings")
        if len(ways) != 1:
            raise ValueError(
                f"engine {self.engine} needs servers: give urls, urls_file, or servers (how many to start)"
            )
        if self.router and (self.servers or self.engine != "sglang"):
            raise ValueError("router: only before running SGLang servers (`urls` or `urls_file`)")
        if self.colocated and not self.servers:
            raise ValueError("colocated: only for servers that the run starts beside itself (`servers`)")
        if self.engine == "vllm" and self.sync.transport != "disk":
            raise ValueError(
                "vllm takes new weights from disk only; set sync.transport to disk, with sync.folder"
            )
        return self

    @property
    def api_key(self) -> str | None:
        """The key that `key_variable` or `key_file` names.

        Raises:
            UserError: there is none.
        """
        return read_key(self.key_variable, self.key_file, "rollout.")

    def needed_gpus(self, ranks: int) -> int:
        """Returns the GPUs that `ranks` ranks and the servers that the run starts need on one node."""
        servers = self.servers * self.tensor
        return max(ranks, servers) if self.colocated else ranks + servers

    def check_gpus(self, ranks: int, gpus: int) -> None:
        """Checks that a node with `gpus` GPUs can have the servers that the run starts beside `ranks` ranks.

        Raises:
            UserError: it has too few, or weights cannot reach the servers as `sync.transport` says.
        """
        needed = self.needed_gpus(ranks)
        if self.servers and needed > gpus:
            beside = "" if self.colocated else f"beside the {ranks} of the ranks "
            share = "" if self.colocated else ", or set rollout.colocated=true, which shares the ranks' GPUs"
            raise UserError(
                f"rollout.servers: {self.servers} servers of tensor {self.tensor} need "
                f"{self.servers * self.tensor} GPUs {beside}on the first node, which has {gpus}; lower "
                f"rollout.servers or rollout.tensor, start fewer ranks on a node{share}"
            )
        if self.servers and ranks:
            self._check_shared_gpus(ranks)

    def _check_shared_gpus(self, ranks: int) -> None:
        """Checks that weights can pass between processes that share GPUs, or share none."""
        kind = self.sync.transport
        if self.colocated and kind == "distributed" and self.sync.backend != "gloo":
            raise UserError(
                "rollout.colocated: NCCL takes one process a GPU, so sync.transport distributed reaches no "
                "server on a rank's GPU; set rollout.sync.transport to tensor, or to disk with a folder"
            )
        if kind == "tensor" and not self.colocated:
            raise UserError(
                "rollout.sync.transport tensor shares GPU memory, which a server on other GPUs cannot see; "
                "set it to distributed or disk, or rollout.colocated to true"
            )
        if kind == "tensor" and self.servers * self.tensor > ranks:
            raise UserError(
                f"rollout.servers: {self.servers} servers of tensor {self.tensor} are not all beside one of "
                f"{ranks} ranks of a node, and those get no weights by sync.transport tensor; lower "
                "rollout.servers, or set sync.transport to disk"
            )
