"""The SGLang client against a real server, and replay through it against `transformers`."""

from __future__ import annotations

import asyncio

import pytest

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.engine import Sampling
from megatron_parallel_r1.rollout.servers.client import (
    INITIAL_VERSION,
    STOCK_MODES,
    GenerateRequest,
    GenerateResult,
    Unreachable,
)
from megatron_parallel_r1.rollout.servers.engine import ServerEngine
from megatron_parallel_r1.rollout.servers.pool import ServerPool
from megatron_parallel_r1.rollout.servers.sglang import SglangClient
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.thought.layout import Mode
from tests.engines.asking import TOLERANCE, all_of, assert_several, difference, many, rolled
from tests.engines.folders import untied_model
from tests.engines.servers import CONTEXT_TOKENS, Shared
from tests.unit.rollout.test_exactness import largest_difference
from tests.unit.rollout.tiny import random_prompts

pytestmark = [pytest.mark.engines, pytest.mark.slow, pytest.mark.xdist_group("sglang")]
NOTHING: frozenset[int] = frozenset()
# Tokens that the model draws now and then.
STOP = {11, 12}


@pytest.fixture
def url(sglang_server: Shared) -> str:
    return sglang_server.url


def test_about(url: str, sglang_server: Shared) -> None:
    about = asyncio.run(SglangClient(url).info())
    assert about.modes == STOCK_MODES and about.version == INITIAL_VERSION and about.seeded
    assert about.model == str(sglang_server.folder) and about.cache_tokens == 20000
    assert 1000 < about.max_tokens <= CONTEXT_TOKENS


def test_log_probs_are_those_of_the_promise_whatever_is_in_the_batch(url: str) -> None:
    samplings = [Sampling(t, p, k) for t in (1.0, 0.7, 0.0, 1.3) for p, k in ((1.0, 0), (1.0, 5), (0.8, 0))]
    requests = many(samplings, 96, STOP)
    model = untied_model()
    completions = asyncio.run(all_of(SglangClient(url), requests))
    worst = max(
        difference(model, request, completion)
        for request, completion in zip(requests, completions, strict=True)
    )
    print(f"sglang: max |server - transformers| = {worst:.2e}")
    assert worst <= TOLERANCE
    ends = dict.fromkeys(STOP, 0)
    for request, completion in zip(requests, completions, strict=True):
        assert not request.suppress & {*completion.tokens}
        assert not request.stop & {*completion.tokens[:-1]}
        assert completion.stopped == (completion.tokens[-1] in request.stop)
        assert completion.stopped or len(completion.tokens) == request.limit
        if completion.stopped:
            ends[completion.tokens[-1]] += 1
    assert min(ends.values()) >= 5 and sum(ends.values()) < len(requests)


def test_a_seed_fixes_what_is_drawn_and_others_differ(url: str) -> None:
    requests = many([Sampling(), Sampling(0.7)], 48, STOP)
    together = asyncio.run(all_of(SglangClient(url), requests))
    # A float tie that a batch's rounding breaks otherwise would be one of 2e-7 among some hundred draws.
    assert [asyncio.run(all_of(SglangClient(url), [request]))[0].tokens for request in requests[:12]] == [
        completion.tokens for completion in together[:12]
    ]
    seeds = [
        GenerateRequest((7, 8), Sampling(seed=seed), 20, NOTHING, NOTHING, "t")
        for seed in (3, 4, 3 + (1 << 40))
    ]
    assert len({completion.tokens for completion in asyncio.run(all_of(SglangClient(url), seeds))}) == 3


def test_draws_follow_the_position_so_that_a_continuation_may_be_cut(url: str) -> None:
    whole = GenerateRequest((7, 8), Sampling(seed=9), 20, NOTHING, NOTHING, "t")
    (drawn,) = asyncio.run(all_of(SglangClient(url), [whole]))
    rest = GenerateRequest((7, 8, *drawn.tokens[:8]), Sampling(seed=9), 12, NOTHING, NOTHING, "t")
    assert asyncio.run(all_of(SglangClient(url), [rest]))[0].tokens == drawn.tokens[8:]


def test_several_continuations_of_one_text(url: str) -> None:
    assert_several(ServerPool(SglangClient, [url]))


def test_score_abort_and_refusal(url: str) -> None:
    request = GenerateRequest((7, 8, 9), Sampling(seed=2), 10, NOTHING, NOTHING, "t")
    (drawn,) = asyncio.run(all_of(SglangClient(url), [request]))
    scored = asyncio.run(SglangClient(url).score((7, 8, 9, *drawn.tokens)))
    assert scored[2:] == pytest.approx(drawn.logprobs, abs=TOLERANCE)
    with pytest.raises(UserError, match=f"{url}/generate answered 400: .*longer than the model's context"):
        asyncio.run(
            SglangClient(url).generate(GenerateRequest((7,) * 2000, Sampling(), 5, NOTHING, NOTHING, "t"))
        )

    async def work() -> list[object]:
        async def abort() -> None:
            # Until it has met them all: one that has not arrived yet is not aborted.
            while not all(answer.done() for answer in answers):
                await server.abort_all()
                await asyncio.sleep(0.05)

        server = SglangClient(url)
        long = [
            GenerateRequest((7, seed + 8), Sampling(seed=seed), 990, NOTHING, NOTHING, "t")
            for seed in range(3)
        ]
        answers = [asyncio.ensure_future(server.generate(request)) for request in long]
        await abort()
        return await asyncio.gather(*answers, return_exceptions=True)

    # One may have been drawn to its end before the first abort came.
    kinds = {type(result) for result in asyncio.run(work())}
    assert Unreachable in kinds and kinds <= {Unreachable, GenerateResult}


@pytest.mark.parametrize("mode", ["replay", "causal", "sequential"])
def test_traces_are_exact_and_share_the_cache(url: str, mode: Mode) -> None:
    pool = ServerPool(SglangClient, [url])
    pool.wait_ready()
    engine = ServerEngine(pool)
    prompts = random_prompts(24)
    thinking = Thinking(mode=mode, max_blocks=3, max_depth=2, max_path_tokens=20, max_response_tokens=150)
    traces = rolled(engine, thinking, prompts)
    metrics = pool.metrics()
    worst = largest_difference(untied_model(), traces, mode)
    cached = metrics["server_cached_share"]
    print(f"sglang, {mode}: max |server - transformers| = {worst:.2e}, cached {cached:.1%}")
    assert worst <= TOLERANCE
    if mode == "sequential":
        assert not any(trace.tree.blocks for trace in traces)
        return
    assert max(trace.tree.depth for trace in traces) == 2
    assert sum(len(trace.tree.blocks) > 1 for trace in traces) >= 3
    # What is not cached is a prompt once, and of a continuation what no server drew: tags and other paths.
    assert cached > 0.7
    few = rolled(engine, thinking, prompts[:6], concurrent=2)
    assert [trace.tokens for trace in few] == [trace.tokens for trace in traces[:6]]
