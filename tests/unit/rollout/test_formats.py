"""The loop in every format: what is forced where, limits, plans, and what a server is asked."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_parallel_r1.rollout.joined_blocks import JoinedBlock, check_blocks
from megatron_parallel_r1.rollout.servers.client import STOCK_MODES, ServerInfo
from megatron_parallel_r1.rollout.servers.engine import ServerEngine
from megatron_parallel_r1.rollout.servers.pool import PoolSettings, ServerPool
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.rollout.thinking import Thinker, roll_out
from megatron_parallel_r1.thought.layout import critical_length
from megatron_parallel_r1.thought.parser import parse
from megatron_parallel_r1.thought.tags import Tags
from megatron_parallel_r1.thought.trace import Trace
from tests.reference.formats import ALL, tags_of
from tests.unit.rollout.fake_servers import FakeServer
from tests.unit.rollout.test_exactness import TOLERANCE, largest_difference
from tests.unit.rollout.tiny import eager_of, native_engine, random_prompts, tiny_qwen3, traces_of

TAGS = {name: tags_of(format) for name, format in ALL.items()}
MODELS = {name: tiny_qwen3(eager=eager_of(tags)) for name, tags in TAGS.items()}
names = st.sampled_from(sorted(ALL))


def check(trace: Trace, thinking: Thinking, tags: Tags) -> None:
    """Holds a trace to its limits, and to what its format forces."""
    length = len(trace.tokens)
    assert length <= thinking.max_response_tokens
    assert critical_length(trace.tree) <= (thinking.max_critical_tokens or thinking.max_response_tokens)
    assert len(trace.tree.blocks) <= thinking.max_blocks and trace.tree.depth <= thinking.max_depth
    if trace.finish == "eos":
        assert trace.tokens[-1] == tags.eos and trace.sampled[-1]
    ends = set()
    for _, block in trace.tree.all_blocks():
        assert len(block.paths) == (block.planned if tags.plan_end is not None else thinking.paths)
        assert block.end is not None
        for number, path in enumerate(block.paths, start=1):
            start, stop = path.inside
            assert trace.tokens[path.start : start] == tags.path_begin(number) and path.closed
            assert 1 <= stop - start + trace.sampled[stop] <= thinking.max_path_tokens
        after = block.summary.inside[0] if block.summary is not None else block.stop(length)
        assert trace.tokens[block.end : after] == tags.joined
        if block.summary is not None and block.summary.closed:
            assert trace.tokens[block.summary.stop : block.stop(length)] == tags.behind
        ends |= {end - 1 for end in block.own_ends if end < length or block.summary is None}
    forced = {index for index, sampled in enumerate(trace.sampled) if not sampled}
    assert trace.tree.forced() <= forced <= trace.tree.forced() | ends
    assert all(trace.logprobs[index] == 0.0 for index in forced)
    opened = [index for index, token in enumerate(trace.tokens) if token == tags.parallel]
    assert not any(trace.suppressed[index] for index in opened)


@settings(max_examples=30, deadline=None)
@given(st.data(), names)
def test_limits_and_forced_texts_hold_in_every_format(data: st.DataObject, name: str) -> None:
    thinking = Thinking(
        mode=data.draw(st.sampled_from(["isolated", "replay", "causal"])),
        paths=data.draw(st.integers(1, 3)),
        max_blocks=data.draw(st.integers(0, 3)),
        max_depth=data.draw(st.integers(1, 2)),
        max_path_tokens=data.draw(st.integers(1, 80)),
        max_response_tokens=data.draw(st.integers(1, 300)),
        max_critical_tokens=data.draw(st.none() | st.integers(20, 200)),
        reserve_tokens=data.draw(st.integers(0, 10)),
    )
    seed, tags = data.draw(st.integers(0, 10**6)), TAGS[name]
    for trace in traces_of(native_engine(MODELS[name]), thinking, random_prompts(3, seed), tags=tags):
        check(trace, thinking, tags)


@pytest.mark.parametrize("mode", ["isolated", "replay", "causal"])
@pytest.mark.parametrize("name", sorted(ALL.keys() - {"parallel_r1"}))
def test_logprobs_equal_a_recomputation_in_every_format(name: str, mode: str) -> None:
    thinking = Thinking(mode=mode, paths=3, max_depth=2, max_path_tokens=90, max_response_tokens=400)
    engine, tags = native_engine(MODELS[name]), TAGS[name]
    traces = traces_of(engine, thinking, random_prompts(10), tags=tags)
    assert sum(bool(trace.tree.blocks) for trace in traces) >= 3
    assert largest_difference(MODELS[name], traces, mode) <= TOLERANCE


@pytest.mark.parametrize("bad_plan", ["continue", "end"])
def test_a_plan_of_too_many_items_does_what_the_format_says(bad_plan: str) -> None:
    tags = tags_of(replace(ALL["npr"], max_paths=1, bad_plan=bad_plan))
    engine = native_engine(tiny_qwen3(eager=eager_of(tags)))
    traces = traces_of(engine, Thinking(max_response_tokens=150), random_prompts(30), tags=tags)
    refused = 0
    for trace in traces:
        plans = [problem for problem in trace.tree.problems if problem.what.startswith("a plan of")]
        refused += len(plans)
        assert all(len(block.paths) == 1 for _, block in trace.tree.all_blocks())
        if plans and bad_plan == "end":
            last = plans[-1].index
            assert last == len(trace.tokens) - 1 and trace.tokens[last] == tags.plan_end
            assert trace.finish == "length"
    assert refused >= 10
    if bad_plan == "continue":
        assert any(trace.finish == "eos" and trace.tree.problems for trace in traces)


@settings(max_examples=25, deadline=None)
@given(names, st.integers(0, 10**6), st.integers(1, 2))
def test_a_server_is_told_the_blocks_that_the_parser_finds(name: str, seed: int, depth: int) -> None:
    tags = TAGS[name]
    server = FakeServer("http://a", ServerInfo("model", STOCK_MODES | {"isolated"}, 0, 10_000, None))
    pool = ServerPool(lambda url: server, [server.url], PoolSettings(check_s=60.0))
    pool.wait_ready()
    thinker = Thinker(ServerEngine(pool), tags, Thinking(max_depth=depth, max_response_tokens=300))
    asyncio.run(roll_out(thinker, [[20, 21]], [seed]))
    for request in server.seen:
        tree = parse(request.tokens[2:], tags)
        found = [
            JoinedBlock(2 + block.paths[0].start, tuple(2 + path.stop for path in block.paths))
            for _, block in tree.all_blocks()
            if block.end is not None
        ]
        assert request.joined == tuple(sorted(found, key=lambda block: block.fork))
        check_blocks(request.joined, 0, len(request.tokens))
