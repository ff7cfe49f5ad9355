"""What the tests of clients and pool share: requests, traces, and their referee."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence, Set
from dataclasses import replace

import torch
from transformers import Qwen3ForCausalLM

from megatron_parallel_r1.rollout.engine import Completion, Sampling
from megatron_parallel_r1.rollout.servers.client import GenerateRequest, GenerateResult, Server
from megatron_parallel_r1.rollout.servers.engine import ServerEngine
from megatron_parallel_r1.rollout.servers.pool import ServerPool
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.rollout.thinking import Thinker, roll_out
from megatron_parallel_r1.thought.trace import Trace
from tests.reference.traces import TAGS

TOLERANCE = 2e-5  # float32, logits of some units: a few hundred roundings of 6e-8


@torch.no_grad()
def expected(model: Qwen3ForCausalLM, request: GenerateRequest, completion: Completion) -> list[float]:
    """Log-probs of the drawn tokens, by the definition in `base.Completion`; float64 from the logits on."""
    tokens = torch.tensor([[*request.tokens, *completion.tokens]])
    logits_LV = model(tokens).logits[0].double()
    logits_LV[:, sorted(request.suppress)] = -math.inf
    logprobs_LV = (logits_LV / (request.sampling.temperature or 1.0)).log_softmax(-1)
    first = len(request.tokens) - 1
    return [logprobs_LV[first + i, token].item() for i, token in enumerate(completion.tokens)]


def difference(model: Qwen3ForCausalLM, request: GenerateRequest, completion: Completion) -> float:
    pairs = zip(completion.logprobs, expected(model, request, completion), strict=True)
    return max(abs(got - wanted) for got, wanted in pairs)


def many(samplings: Sequence[Sampling], count: int, stop: Set[int]) -> list[GenerateRequest]:
    """Continuations of various prompts, with stops and suppressed tokens, each with a seed of 63 bits."""
    requests = []
    for index in range(count):
        chosen = samplings[index % len(samplings)]
        sampling = Sampling(chosen.temperature, chosen.top_p, chosen.top_k, (1 << 62) + index)
        tokens = tuple(7 + (index * 7 + place) % 30 for place in range(2 + index % 9))
        suppress = frozenset({0}) if index % 2 else frozenset({0, 3, 9, 21})
        limit = 20 if index % 3 else 2
        requests.append(GenerateRequest(tokens, sampling, limit, frozenset(stop), suppress, str(index)))
    return requests


async def all_of(server: Server, requests: Sequence[GenerateRequest]) -> list[Completion]:
    return [answer.completion for answer in await asyncio.gather(*map(server.generate, requests))]


def rolled(
    engine: ServerEngine, thinking: Thinking, prompts: list[list[int]], concurrent: int = 256
) -> list[Trace]:
    """With 2, 3, 4, 2, … paths."""
    paths = [2 + index % 3 for index in range(len(prompts))]
    thinker = Thinker(engine, TAGS, thinking)
    return asyncio.run(roll_out(thinker, prompts, list(range(len(prompts))), concurrent, paths))


def assert_several(pool: ServerPool) -> None:
    """Continuations of one text, asked for at once, are those of their seeds one by one."""
    pool.wait_ready()
    request = GenerateRequest(
        (7, 8, 9, 10), Sampling(seed=2**63 - 2), 12, frozenset(), frozenset({0}), "several"
    )
    seeds = [2**63 - 2, 2**63 - 1, 0, 1]
    alone = [replace(request, sampling=replace(request.sampling, seed=seed)) for seed in seeds]

    async def together() -> list[GenerateResult]:
        return list(await asyncio.gather(*map(pool.generate, alone)))

    answers = asyncio.run(together())
    drawn = [asyncio.run(pool.generate(request)).completion.tokens for request in alone]
    assert [answer.completion.tokens for answer in answers] == drawn and len(set(drawn)) == 4
