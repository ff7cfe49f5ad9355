"""Settings of rollout servers, and the command line and environment of one server.

The command makes log-probs as `rollout.engine.Completion` defines them: of softmax((logits + bias) /
temperature), before top-k and top-p. SGLang's are so by default; vLLM's are with `--logprobs-mode
processed_logprobs` (which takes them after top-k and top-p: the client sends neither).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from megatron_parallel_r1.rollout.sglang_cpu import NAME as ON_CPU
from megatron_parallel_r1.rollout.sglang_plugin import NAME as JOINS

EngineName = Literal["sglang", "vllm"]
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class LaunchSettings:
    """Rollout servers with the same settings on different ports and GPUs.

    Attributes:
        checkpoint: a Hugging Face folder.
        servers: number of servers.
        tensor, data: parallel sizes of one server, which has `tensor` x `data` GPUs.
        nodes, node_rank: over how many machines the one server extends, and which of them this is.
        rendezvous: `HOST:PORT` of the first of several machines, by which the supervisors on the others find
            it; free there.
        host: address to listen on; 0.0.0.0 is published under this machine's name.
        port: that of the first server, the others follow; 0: free ports.
        gpus: those to use, as CUDA_VISIBLE_DEVICES names them; None: all that are visible.
        device: None: the GPUs, if any.
        dtype: None: float32 on a CPU, the checkpoint's own on a GPU.
        memory_share: share of a GPU's memory for weights and cache; None: the engine's default.
        context_tokens: most tokens of prompt and response; None: the checkpoint's limit.
        cache_tokens: size of the KV cache on a CPU.
        deterministic: a sampled token depends on its request's seed and its position only.
        isolated: SGLang with the plugin that joins isolated paths exactly.
        colocated: a server can release its GPU memory while the trainer learns.
        python: interpreter of the engine; None: that of `make engines`, else this one if it has the engine.
        log_dir: folder of the logs, one file per server.
        urls_file: file for the base URLs, one a line, once all servers are healthy; removed with the servers.
        crashes: consecutive crashes of one server, never healthy in between, before giving up.
        start_seconds: time limit for a server to become healthy; later counts as a crash.
        hang_seconds: a healthy server that gives no answer for so long counts as crashed.
        key_variable, key_file: where the API key that the servers ask for is; None: they ask for none.
        options: further options of the engine's command line; they override the usual ones.
    """

    checkpoint: Path
    engine: EngineName = "sglang"
    servers: int = 1
    tensor: int = 1
    data: int = 1
    nodes: int = 1
    node_rank: int = 0
    rendezvous: str | None = None
    host: str = "127.0.0.1"
    port: int = 30000
    gpus: tuple[str, ...] | None = None
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
    hang_seconds: float = 600.0
    key_variable: str | None = None
    key_file: Path | None = None
    options: tuple[str, ...] = ()


CPU_SHARE = 0.9
# SGLang loads every plugin that it finds unless names are set.
NO_PLUGIN = "none"


KEY_VARIABLES = {"sglang": "PARALLEL_R1_SERVER_KEY", "vllm": "VLLM_API_KEY"}
# SGLang takes a key only from its command line, which all users of a machine see, and logs it.
SGLANG_WITH_KEY = """
import logging, os, runpy, sys
key = os.environ.pop("PARALLEL_R1_SERVER_KEY")
plain = logging.getLogRecordFactory()
def hidden(*args, **more):
    record = plain(*args, **more)
    if key in record.getMessage():
        record.msg, record.args = record.getMessage().replace(key, "***"), ()
    return record
logging.setLogRecordFactory(hidden)
sys.argv += ["--api-key", key]
runpy.run_module("sglang.launch_server", run_name="__main__")
"""


@dataclass(frozen=True, slots=True)
class ServerCommand:
    """Attributes:
    arguments: program first.
    environment: added to this process's own.
    probe: path that is answered only while both the HTTP server and the scheduler behind it run.
    key: that the server asks for; None: none.
    """

    arguments: tuple[str, ...]
    environment: dict[str, str] = field(repr=False)
    probe: str = "/health"
    key: str | None = field(default=None, repr=False)

    def meeting(self, address: str) -> ServerCommand:
        """The command of a part of a server that meets the other parts at `HOST:PORT`."""
        return replace(self, arguments=(*self.arguments, "--dist-init-addr", address))


def build_command(
    settings: LaunchSettings,
    python: Path,
    device: Device,
    port: int,
    gpus: tuple[str, ...] = (),
    key: str | None = None,
) -> ServerCommand:
    """The command of one server.

    Args:
        python: of the engine's environment.
        gpus: as CUDA_VISIBLE_DEVICES names them; none on a CPU.
        key: that the server asks for; it is in its environment, not on its command line, which all users see.
    """
    builders = {"sglang": _sglang, "vllm": _vllm}
    command = builders[settings.engine](settings, device)
    listen = ("--host", settings.host, "--port", str(port))
    environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | command.environment
    if device == "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    else:
        # With several servers on few cores, a second thread only takes another server's core.
        environment["OMP_NUM_THREADS"] = "1"
        # Engines compile small functions during the first request that needs them. That requires a C++
        # compiler, and on a busy machine takes longer than a client waits.
        environment["TORCH_COMPILE_DISABLE"] = "1"
    program = command.arguments
    if key is not None:
        environment[KEY_VARIABLES[settings.engine]] = key
    if key is not None and settings.engine == "sglang":
        program = ("-c", SGLANG_WITH_KEY, *program[2:])
    return ServerCommand((str(python), *program, *listen, *settings.options), environment, command.probe, key)


def _sglang(settings: LaunchSettings, device: Device) -> ServerCommand:
    arguments = ["-m", "sglang.launch_server", "--model-path", str(settings.checkpoint)]
    arguments += ["--tp-size", str(settings.tensor), "--dp-size", str(settings.data)]
    if settings.nodes > 1:
        arguments += ["--nnodes", str(settings.nodes), "--node-rank", str(settings.node_rank)]
    arguments += ["--dtype", settings.dtype or ("float32" if device == "cpu" else "auto")]
    if settings.context_tokens is not None:
        arguments += ["--context-length", str(settings.context_tokens)]
    if _has_experts(settings.checkpoint):
        arguments += ["--enable-return-routed-experts"]
    plugins = [JOINS] if settings.isolated else []
    environment: dict[str, str] = {}
    if device == "cpu":
        arguments += ["--device", "cpu", "--attention-backend", "torch_native"]
        arguments += ["--sampling-backend", "pytorch", "--grammar-backend", "none"]
        arguments += ["--disable-overlap-schedule", "--disable-cuda-graph", "--skip-server-warmup"]
        arguments += ["--max-total-tokens", str(settings.cache_tokens)]
        # The tokens bound the cache. The share must leave room for memory that other processes take while a
        # server starts: SGLang counts it as its own, and exits if the sum exceeds the share.
        arguments += ["--mem-fraction-static", str(settings.memory_share or CPU_SHARE)]
        # Otherwise it polls for requests, and takes a core from a trainer beside it.
        arguments += ["--sleep-on-idle"]
        environment["SGLANG_USE_CPU_ENGINE"] = "0"
        # With several ranks SGLang would use the NCCL that a CUDA build of torch brings.
        environment["SGLANG_NCCL_SO_PATH"] = "none"
        plugins += [ON_CPU] if settings.deterministic else []
    else:
        if settings.memory_share is not None:
            arguments += ["--mem-fraction-static", str(settings.memory_share)]
        arguments += ["--enable-deterministic-inference"] if settings.deterministic else []
        arguments += ["--enable-memory-saver"] if settings.colocated else []
    environment["SGLANG_PLUGINS"] = ",".join(plugins) or NO_PLUGIN
    return ServerCommand(tuple(arguments), environment, probe="/server_info")


def _has_experts(checkpoint: Path) -> bool:
    """Whether a folder's config.json is of a mixture of experts. The engine reports one that is damaged."""
    try:
        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    counts = ("num_experts", "num_local_experts", "n_routed_experts")
    return isinstance(config, dict) and any(config.get(name) for name in counts)


def _vllm(settings: LaunchSettings, device: Device) -> ServerCommand:
    arguments = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(settings.checkpoint)]
    arguments += ["--tensor-parallel-size", str(settings.tensor), "--data-parallel-size", str(settings.data)]
    arguments += ["--dtype", settings.dtype or ("float32" if device == "cpu" else "auto")]
    arguments += ["--logprobs-mode", "processed_logprobs", "--enable-prompt-tokens-details"]
    # Enables the endpoint that takes token ids and any logit bias.
    arguments += ["--enable-scale-out"]
    if settings.context_tokens is not None:
        arguments += ["--max-model-len", str(settings.context_tokens)]
    # Enables the endpoints that update weights and flush the cache.
    environment = {"VLLM_SERVER_DEV_MODE": "1"}
    if device == "cpu":
        arguments += ["--enforce-eager", "--block-size", "32"]
        environment["VLLM_CPU_KVCACHE_SPACE"] = "1"
    else:
        if settings.memory_share is not None:
            arguments += ["--gpu-memory-utilization", str(settings.memory_share)]
        arguments += ["--enable-sleep-mode"] if settings.colocated else []
        if settings.deterministic:
            environment["VLLM_BATCH_INVARIANT"] = "1"
    return ServerCommand(tuple(arguments), environment, probe="/health")
