"""Contexts as token lists: what a server is asked, in each mode."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_parallel_r1.rollout.engine import Sampling
from megatron_parallel_r1.rollout.joined_blocks import JoinedBlock, check_blocks
from megatron_parallel_r1.rollout.servers.client import STOCK_MODES, GenerateRequest, ServerInfo
from megatron_parallel_r1.rollout.servers.engine import ServerEngine
from megatron_parallel_r1.rollout.servers.pool import PoolSettings, ServerPool
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.rollout.thinking import Thinker, roll_out
from megatron_parallel_r1.thought.layout import isolated_positions
from megatron_parallel_r1.thought.parser import parse
from megatron_parallel_r1.thought.trace import Trace
from tests.reference.traces import TAGS
from tests.unit.rollout.fake_servers import FakeServer, drawn
from tests.unit.rollout.tiny import random_prompts

MODES = STOCK_MODES | {"isolated"}


def engine_of(server: FakeServer) -> ServerEngine:
    pool = ServerPool(lambda url: server, [server.url], PoolSettings(check_s=60.0))
    pool.wait_ready()
    return ServerEngine(pool)


def rolled(server: FakeServer, thinking: Thinking, prompts: list[list[int]], seed: int = 0) -> list[Trace]:
    thinker = Thinker(engine_of(server), TAGS, thinking)
    return asyncio.run(roll_out(thinker, prompts, [seed + i for i in range(len(prompts))]))


def closed_blocks(request: GenerateRequest, prompt: int) -> tuple[JoinedBlock, ...]:
    """What the parser finds closed in a request's text."""
    tree = parse(request.tokens[prompt:], TAGS)
    blocks = [
        JoinedBlock(prompt + block.paths[0].start, tuple(prompt + path.stop for path in block.paths))
        for _, block in tree.all_blocks()
        if block.end is not None
    ]
    return tuple(sorted(blocks, key=lambda block: block.fork))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_joined_blocks_are_those_that_the_parser_finds(data: st.DataObject) -> None:
    thinking = Thinking(
        paths=data.draw(st.integers(1, 4)),
        max_blocks=3,
        max_depth=data.draw(st.integers(1, 3)),
        max_path_tokens=data.draw(st.integers(3, 30)),
        max_response_tokens=140,
    )
    server = FakeServer("http://a", ServerInfo("model", MODES, 0, 10_000, None))
    prompt = data.draw(st.lists(st.integers(7, 25), min_size=1, max_size=4))
    rolled(server, thinking, [prompt], data.draw(st.integers(0, 10**6)))
    for request in server.seen:
        assert request.joined == closed_blocks(request, len(prompt))
        check_blocks(request.joined, 0, len(request.tokens))


def test_nested_joins_give_the_positions_of_the_layout() -> None:
    """From the joined blocks alone a server must find where each token lies."""
    server = FakeServer("http://a", ServerInfo("model", MODES, 0, 10_000, None))
    rolled(server, Thinking(max_depth=3, max_path_tokens=40, max_response_tokens=300), random_prompts(30))
    nested = [request for request in server.seen if any(inside(request.joined))]
    assert len(nested) >= 10
    for request in nested:
        tree = parse(request.tokens, TAGS)
        if all(block.end is not None for _, block in tree.all_blocks()):
            assert positions(request.joined, len(request.tokens)) == isolated_positions(tree).tolist()


def inside(joined: tuple[JoinedBlock, ...]) -> list[JoinedBlock]:
    return [b for a in joined for b in joined if a.fork < b.fork < a.ends[-1]]


def positions(joined: tuple[JoinedBlock, ...], length: int) -> list[int]:
    """By the definition: one more than the token before, but a path's first follows the block's `<Parallel>`,
    and what closes a block follows its furthest token."""
    found = np.arange(length)
    firsts = {start: block.fork - 1 for block in joined for start in (block.fork, *block.ends[:-1])}
    closings = {block.ends[-1]: block for block in joined}
    for index in range(1, length):
        if index in firsts:
            found[index] = found[firsts[index]] + 1
        elif index in closings:
            found[index] = found[closings[index].fork : index].max() + 1
        else:
            found[index] = found[index - 1] + 1
    return found.tolist()


@pytest.mark.parametrize("mode", ["replay", "causal", "sequential"])
def test_what_a_path_and_a_summary_follow(mode: str) -> None:
    server = FakeServer("http://a")
    traces = rolled(
        server, Thinking(mode=mode, paths=3, max_depth=2, max_response_tokens=200), random_prompts(8)
    )
    texts = {request.tokens for request in server.seen}
    assert not any(request.joined for request in server.seen)
    assert (mode == "sequential") == (not any(trace.tree.blocks for trace in traces))
    for trace in traces:
        whole = (*trace.prompt, *trace.tokens)
        for block in trace.tree.blocks:
            head = len(trace.prompt)
            if block.summary is not None:
                assert whole[: head + block.summary.start + 1] in texts
            for path in block.paths:
                before = path.start if mode == "causal" else block.paths[0].start
                assert (*whole[: head + before], TAGS.path) in texts


def test_forks_of_a_prompt_are_traces_and_their_forks_are_paths() -> None:
    engine = engine_of(FakeServer("http://a"))

    async def work() -> None:
        prompt = engine.open()
        await engine.write(prompt, [7, 8])
        first, second = engine.fork(prompt), engine.fork(prompt)
        assert first.trace != second.trace and prompt.trace is None
        path = engine.fork(first)
        assert path.trace == first.trace
        completion = await engine.sample(path, Sampling(seed=3), 5, frozenset(), frozenset({0}))
        assert path.tokens == [7, 8, *completion.tokens] and first.tokens == [7, 8]
        request = GenerateRequest((7, 8), Sampling(seed=3), 5, frozenset(), frozenset({0}), str(path.trace))
        assert completion == drawn(request)
        await engine.sample(prompt, Sampling(), 1, frozenset(), frozenset())
        assert prompt.trace not in (None, first.trace, second.trace)

    asyncio.run(work())


def test_weights_go_to_the_publisher_and_fixed_ones_to_nobody() -> None:
    published: list[tuple[list[str], int]] = []
    server = FakeServer("http://a")
    engine = engine_of(server)
    with pytest.raises(RuntimeError, match="keep the weights"):
        engine.load_weights([], 1)

    def publish(tensors: object, version: int) -> None:
        published.append(([name for name, _ in tensors], version))
        server.info_sent = replace(server.info_sent, version=version)
        engine.pool.set_version(version, [server.url])

    engine = ServerEngine(engine.pool, publish)
    engine.load_weights([("w", torch.zeros(1))], 4)
    engine.offer_weights(iter([("v", torch.zeros(1))]), 5)
    assert published == [(["w"], 4), (["v"], 5)] and engine.version == 5
    assert engine.modes == STOCK_MODES and not engine.runs_on_all_ranks
