"""What the tests of clients and pool share: a folder whose model opens blocks, traces, and their referee."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_parallel_r1.rollout.base import Completion, Sampling
from megatron_parallel_r1.rollout.server import Asked, Server
from megatron_parallel_r1.rollout.server_engine import ServerEngine
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.rollout.thinking import Thinker, roll_out
from megatron_parallel_r1.thought.trace import Trace
from tests.reference.traces import TAGS
from tests.unit.rollout.tiny import EAGER, VOCABULARY

TOLERANCE = 2e-5  # float32, logits of some units: a few hundred roundings of 6e-8


def eager_qwen3() -> Qwen3ForCausalLM:
    """As `tiny_qwen3`, untied so that tags are likely, with heads of 32, the least that vLLM's CPU has."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rope_theta=1000.0,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    model = Qwen3ForCausalLM(config).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * (0.15 if weight.dim() > 1 else 0.1))
        model.model.embed_tokens.weight[:, 0] = 8.0
        model.lm_head.weight[:, 0] = 0.0
        for token, nats in EAGER.items():
            model.lm_head.weight[token, 0] = nats / 4.15
    return model


def write_eager(folder: Path) -> Path:
    """No tokenizer: the servers of these tests are started without one."""
    eager_qwen3().save_pretrained(folder)
    return folder


@torch.no_grad()
def expected(model: Qwen3ForCausalLM, asked: Asked, completion: Completion) -> list[float]:
    """Log-probs of the drawn tokens, by the definition in `base.Completion`; float64 from the logits on."""
    tokens = torch.tensor([[*asked.tokens, *completion.tokens]])
    logits_LV = model(tokens).logits[0].double()
    logits_LV[:, sorted(asked.suppress)] = -math.inf
    logprobs_LV = (logits_LV / (asked.sampling.temperature or 1.0)).log_softmax(-1)
    first = len(asked.tokens) - 1
    return [logprobs_LV[first + i, token].item() for i, token in enumerate(completion.tokens)]


def difference(model: Qwen3ForCausalLM, asked: Asked, completion: Completion) -> float:
    pairs = zip(completion.logprobs, expected(model, asked, completion), strict=True)
    return max(abs(got - wanted) for got, wanted in pairs)


def many(samplings: Sequence[Sampling], count: int) -> list[Asked]:
    """Continuations of various prompts, with stops and suppressed tokens, each with a seed of 63 bits."""
    asked = []
    for index in range(count):
        chosen = samplings[index % len(samplings)]
        sampling = Sampling(chosen.temperature, chosen.top_p, chosen.top_k, (1 << 62) + index)
        tokens = tuple(7 + (index * 7 + place) % 30 for place in range(2 + index % 9))
        suppress = frozenset({0}) if index % 2 else frozenset({0, 3, 9, 21})
        limit = 20 if index % 3 else 2
        asked.append(Asked(tokens, sampling, limit, frozenset({5, 6}), suppress, str(index)))
    return asked


async def all_of(server: Server, asked: Sequence[Asked]) -> list[Completion]:
    return [answer.completion for answer in await asyncio.gather(*map(server.generate, asked))]


def rolled(
    engine: ServerEngine, thinking: Thinking, prompts: list[list[int]], concurrent: int = 256
) -> list[Trace]:
    """With 2, 3, 4, 2, … paths."""
    paths = [2 + index % 3 for index in range(len(prompts))]
    thinker = Thinker(engine, TAGS, thinking)
    return asyncio.run(roll_out(thinker, prompts, list(range(len(prompts))), concurrent, paths))


def kill(url: str) -> None:
    """kill -9 of the server that listens there, with all that it started and what watches it."""
    port = url.rsplit(":", 1)[1]
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or ()
        if "--port" in command and port in command:
            for one in [*process.children(recursive=True), process]:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
