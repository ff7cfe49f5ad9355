"""The command line and environment of one server.

The settings make log-probs what `rollout.base.Completion` says: of softmax((logits + bias) / temperature),
before top-k and top-p. SGLang's are so by itself; vLLM's are with `--logprobs-mode processed_logprobs` (which
are taken behind top-k and top-p too: the client asks it for none).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_parallel_r1.rollout.launcher.settings import Device, Serving
from megatron_parallel_r1.rollout.sglang_plugin import NAME as JOINS
from megatron_parallel_r1.rollout.sglang_seeds import NAME as SEEDS

CPU_SHARE = 0.9
# SGLang loads every plugin that it finds unless it is told names.
NO_PLUGIN = "none"


@dataclass(frozen=True, slots=True)
class Command:
    """Attributes:
    arguments: program first.
    environment: to be set on top of this process's own.
    """

    arguments: tuple[str, ...]
    environment: dict[str, str]


def command_of(
    serving: Serving, python: Path, device: Device, port: int, gpus: tuple[str, ...] = ()
) -> Command:
    """Of one server.

    Args:
        python: that of the engine's environment.
        gpus: as CUDA_VISIBLE_DEVICES names them; on a CPU none.
    """
    make = {"sglang": _sglang, "vllm": _vllm}[serving.engine]
    command = make(serving, device)
    where = ("--host", serving.host, "--port", str(port))
    environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | command.environment
    if device == "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    else:
        # Several servers on few cores: a second thread of one only takes another's core.
        environment["OMP_NUM_THREADS"] = "1"
        # Engines compile small functions within the first request that needs them. That asks for a C++
        # compiler, and on a busy machine takes longer than a client waits.
        environment["TORCH_COMPILE_DISABLE"] = "1"
    return Command((str(python), *command.arguments, *where, *serving.options), environment)


def _sglang(serving: Serving, device: Device) -> Command:
    arguments = ["-m", "sglang.launch_server", "--model-path", str(serving.checkpoint)]
    arguments += ["--tp-size", str(serving.tensor), "--dp-size", str(serving.data)]
    arguments += ["--dtype", serving.dtype or ("float32" if device == "cpu" else "auto")]
    if serving.context_tokens is not None:
        arguments += ["--context-length", str(serving.context_tokens)]
    plugins = [JOINS] if serving.isolated else []
    environment: dict[str, str] = {}
    if device == "cpu":
        arguments += ["--device", "cpu", "--attention-backend", "torch_native"]
        arguments += ["--sampling-backend", "pytorch", "--grammar-backend", "none"]
        arguments += ["--disable-overlap-schedule", "--disable-cuda-graph", "--skip-server-warmup"]
        arguments += ["--max-total-tokens", str(serving.cache_tokens)]
        # The tokens bound the cache. The share must leave room for what other processes take while a server
        # starts: it counts that as its own, and ends where the sum is above the share.
        arguments += ["--mem-fraction-static", str(serving.memory_share or CPU_SHARE)]
        # It looks for requests all the time otherwise, and takes a core from a trainer beside it.
        arguments += ["--sleep-on-idle"]
        environment["SGLANG_USE_CPU_ENGINE"] = "0"
        plugins += [SEEDS] if serving.deterministic else []
    else:
        if serving.memory_share is not None:
            arguments += ["--mem-fraction-static", str(serving.memory_share)]
        arguments += ["--enable-deterministic-inference"] if serving.deterministic else []
        arguments += ["--enable-memory-saver"] if serving.colocated else []
    environment["SGLANG_PLUGINS"] = ",".join(plugins) or NO_PLUGIN
    return Command(tuple(arguments), environment)


def _vllm(serving: Serving, device: Device) -> Command:
    arguments = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(serving.checkpoint)]
    arguments += ["--tensor-parallel-size", str(serving.tensor), "--data-parallel-size", str(serving.data)]
    arguments += ["--dtype", serving.dtype or ("float32" if device == "cpu" else "auto")]
    arguments += ["--logprobs-mode", "processed_logprobs", "--enable-prompt-tokens-details"]
    # Opens the endpoint that takes token ids and any logit bias.
    arguments += ["--enable-scale-out"]
    if serving.context_tokens is not None:
        arguments += ["--max-model-len", str(serving.context_tokens)]
    # The calls that update weights and flush the cache.
    environment = {"VLLM_SERVER_DEV_MODE": "1"}
    if device == "cpu":
        arguments += ["--enforce-eager", "--block-size", "32"]
        environment["VLLM_CPU_KVCACHE_SPACE"] = "1"
    else:
        if serving.memory_share is not None:
            arguments += ["--gpu-memory-utilization", str(serving.memory_share)]
        arguments += ["--enable-sleep-mode"] if serving.colocated else []
        if serving.deterministic:
            environment["VLLM_BATCH_INVARIANT"] = "1"
    return Command(tuple(arguments), environment)
