"""What `parallel-r1 serve-rollout` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

EngineName = Literal["sglang", "vllm"]
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class Serving:
    """Servers alike but for their place.

    Attributes:
        checkpoint: a Hugging Face folder.
        servers: how many.
        tensor, data: GPUs of one server: `tensor` x `data`.
        host: where to listen; 0.0.0.0 is told to others under this machine's name.
        port: of the first server, the next ones follow; 0: free ones.
        device: None: the GPUs if there are any.
        dtype: None: float32 on a CPU, the checkpoint's own on a GPU.
        memory_share: of a GPU's memory, for weights and cache; None: the engine's own choice.
        context_tokens: prompt and continuation of one request; None: as the checkpoint says.
        cache_tokens: of the key/value cache on a CPU.
        deterministic: a draw depends on its request's seed and its position alone.
        isolated: SGLang with the plugin that joins isolated paths exactly.
        colocated: a server can give up its GPU memory while the trainer learns.
        python: the engine's interpreter; None: that of `make engines`, else this one if it has the engine.
        log_dir: one log file a server.
        urls_file: gets the base URLs, one a line, once all are healthy; is gone when the servers are.
        crashes: so many ends of one server in a row, never healthy in between, are given up on.
        start_seconds: a server that is not healthy by then has crashed.
        options: further options for each engine's command line; they win over the usual ones.
    """

    checkpoint: Path
    engine: EngineName = "sglang"
    servers: int = 1
    tensor: int = 1
    data: int = 1
    host: str = "127.0.0.1"
    port: int = 30000
    device: Device | None = None
    dtype: str | None = None
    memory_share: float | None = None
    context_tokens: int | None = None
    cache_tokens: int = 20000
    deterministic: bool = True
    isolated: bool = False
    colocated: bool = False
    python: Path | None = None
    log_dir: Path = Path("runs/servers")
    urls_file: Path | None = None
    crashes: int = 3
    start_seconds: float = 1800.0
    options: tuple[str, ...] = ()
