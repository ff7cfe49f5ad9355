"""The loop's limits and bookkeeping, with the native engine on a random model."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_parallel_r1.rollout.engine import Sampling
from megatron_parallel_r1.rollout.native.sampler import sample_tokens, uniform_draws
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.rollout.thinking import Thinker, roll_out
from megatron_parallel_r1.thought.layout import critical_length
from megatron_parallel_r1.thought.trace import Trace
from tests.reference.traces import TAGS
from tests.unit.rollout.tiny import native_engine, random_prompts, tiny_qwen3, traces_of

MODEL = tiny_qwen3()


def check_limits(trace: Trace, thinking: Thinking) -> None:
    assert len(trace.tokens) <= thinking.max_response_tokens
    assert critical_length(trace.tree) <= (thinking.max_critical_tokens or thinking.max_response_tokens)
    assert len(trace.tree.blocks) <= thinking.max_blocks
    assert trace.tree.depth <= thinking.max_depth
    if trace.finish == "eos":
        assert trace.tokens[-1] == TAGS.eos and trace.sampled[-1]
    cut_ends = set()
    for _, block in trace.tree.all_blocks():
        assert len(block.paths) == thinking.paths and block.end is not None
        assert block.summary is not None or block is trace.tree.blocks[-1]
        for path in block.paths:
            assert path.closed
            drawn = path.stop - path.start - 1
            if not trace.sampled[path.stop - 1]:
                cut_ends.add(path.stop - 1)
                drawn -= 1
            assert 1 <= drawn <= thinking.max_path_tokens
        if block.summary is not None and not trace.sampled[block.summary.stop - 1]:
            cut_ends.add(block.summary.stop - 1)
    forced = {index for index, sampled in enumerate(trace.sampled) if not sampled}
    assert forced - cut_ends <= trace.tree.forced() <= forced
    assert all(trace.logprobs[index] == 0.0 for index in forced)
    opened = [index for index, token in enumerate(trace.tokens) if token == TAGS.parallel]
    assert not any(trace.suppressed[index] for index in opened)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_limits_hold_exactly(data: st.DataObject) -> None:
    thinking = Thinking(
        mode=data.draw(st.sampled_from(["isolated", "replay", "causal"])),
        paths=data.draw(st.integers(1, 4)),
        max_blocks=data.draw(st.integers(0, 3)),
        max_depth=data.draw(st.integers(1, 3)),
        max_path_tokens=data.draw(st.integers(1, 25)),
        max_response_tokens=data.draw(st.integers(1, 120)),
        max_critical_tokens=data.draw(st.none() | st.integers(1, 60)),
        reserve_tokens=data.draw(st.integers(0, 10)),
    )
    seed = data.draw(st.integers(0, 10**6))
    for trace in traces_of(native_engine(MODEL), thinking, random_prompts(4, seed)):
        check_limits(trace, thinking)


def test_a_trace_fills_its_length_to_the_token() -> None:
    for length in (1, 7, 31):
        thinking = Thinking(mode="sequential", max_response_tokens=length)
        traces = traces_of(native_engine(MODEL), thinking, random_prompts(30))
        assert {len(t.tokens) for t in traces if t.finish == "length"} == {length}


def test_after_max_blocks_a_trace_goes_on() -> None:
    thinking = Thinking(max_blocks=1, max_path_tokens=8)
    traces = traces_of(native_engine(MODEL), thinking, random_prompts(40))
    opened = [trace for trace in traces if trace.tree.blocks and trace.tree.blocks[0].well_formed]
    assert len(opened) > 10 and all(trace.finish == "eos" for trace in traces)
    assert any(len(t.tokens) > t.tree.blocks[0].summary.stop + 5 for t in opened)
    for trace in traces:
        assert trace.tokens.count(TAGS.parallel) <= 1


def test_siblings_differ_and_seeds_repeat() -> None:
    thinking = Thinking(paths=4, max_path_tokens=20)
    first, again = (traces_of(native_engine(MODEL), thinking, random_prompts(20)) for _ in range(2))
    assert [t.tokens for t in first] == [t.tokens for t in again]
    assert [t.logprobs for t in first] == [t.logprobs for t in again]
    contents = [
        tuple(trace.tokens[path.start : path.stop])
        for trace in first
        for _, block in trace.tree.all_blocks()
        for path in block.paths
    ]
    assert len(set(contents)) > 0.7 * len(contents)


def test_all_cache_is_given_back() -> None:
    engine = native_engine(MODEL)
    traces_of(engine, Thinking(max_depth=2), random_prompts(20))
    engine.load_weights(MODEL.state_dict().items(), version=1)
    (trace,) = traces_of(engine, Thinking(), [[9]])
    assert trace.version == 1


def test_open_contexts_forbid_new_weights() -> None:
    engine = native_engine(MODEL)

    async def write() -> None:
        await engine.write(engine.open(), [9, 10])

    asyncio.run(write())
    with pytest.raises(RuntimeError, match="2 cache slots are in use"):
        engine.load_weights(MODEL.state_dict().items(), version=1)


def test_unknown_mode_is_refused() -> None:
    class Stock(type(native_engine(MODEL))):
        modes = frozenset({"replay", "sequential"})

    engine = object.__new__(Stock)
    with pytest.raises(ValueError, match="isolated is not one of the engine's modes: replay, seq"):
        Thinker(engine, TAGS, Thinking())


@pytest.mark.parametrize(
    "wrong", [{"paths": 0}, {"paths": 9}, {"max_depth": 0}, {"top_p": 0.0}, {"temperature": -1.0}]
)
def test_settings_check_themselves(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Thinking(**wrong)


def test_uniforms_are_uniform_and_keyed() -> None:
    drawn = uniform_draws([7] * 20000, range(20000))
    assert abs(drawn.mean() - 0.5) < 0.01 and abs((drawn < 0.1).mean() - 0.1) < 0.01
    assert len(set(drawn)) == 20000
    assert uniform_draws([1], [5]) != uniform_draws([2], [5])


def test_draws_follow_the_distribution_top_k_and_top_p() -> None:
    logits_NV = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(20000, 1)

    def frequencies(sampling: dict, suppress: frozenset[int] = frozenset()) -> torch.Tensor:
        allowed_NV = logits_NV.clone()
        allowed_NV[:, list(suppress)] = -torch.inf
        how = Sampling(seed=3, **sampling)
        columns = (np.full(20000, number) for number in (how.temperature, how.top_k, how.top_p))
        tokens, logprobs = sample_tokens(
            allowed_NV, uniform_draws([how.seed] * 20000, range(20000)), *columns
        )
        expected_V = (allowed_NV[0] / (how.temperature or 1.0)).log_softmax(-1)
        assert torch.allclose(torch.from_numpy(logprobs), expected_V[tokens].double())
        return torch.bincount(torch.from_numpy(tokens), minlength=4) / 20000

    def near(expected: list[float], found: torch.Tensor) -> bool:
        return bool((found - torch.tensor(expected)).abs().max() < 0.015)

    assert near([0.5, 0.3, 0.15, 0.05], frequencies({}))
    assert near([0.625, 0.375, 0, 0], frequencies({"top_k": 2}))
    assert near([0.625, 0.375, 0, 0], frequencies({"top_p": 0.7}))
    assert near([1, 0, 0, 0], frequencies({"top_p": 0.5}))
    assert near([1, 0, 0, 0], frequencies({"temperature": 0.0}))
    assert near([0, 0.6, 0.3, 0.1], frequencies({}, frozenset({0})))
    assert near([0.685, 0.247, 0.062, 0.007], frequencies({"temperature": 0.5}))


@pytest.mark.parametrize("vocabulary", [512, 49_152])
def test_log_probs_err_to_neither_side(vocabulary: int) -> None:
    """`torch.log_softmax` on a CPU is off by 8e-6 on average at 49,152 tokens, and always upwards."""
    logits_NV = torch.randn(64, vocabulary, generator=torch.Generator().manual_seed(0)) * 4
    plain_N = [np.full(64, value) for value in (1.0, 0, 1.0)]
    tokens_N, logprobs_N = sample_tokens(logits_NV, np.random.default_rng(0).random(64), *plain_N)
    errors_N = logprobs_N - logits_NV.double().log_softmax(-1)[torch.arange(64), tokens_N].numpy()
    # Below 16 in size, a float32 is half of 2**-20 at most from what it rounds; the mean of 64 is less off.
    assert abs(logprobs_N).max() < 16
    assert abs(errors_N).max() < 4 * 2.0**-21 and abs(errors_N.mean()) < 2.0**-21


@pytest.mark.parametrize("mode", ["isolated", "sequential"])
def test_every_end_token_ends_a_response(mode: str) -> None:
    """Each of them is a drawn token; before it the trace is as without it."""
    prompts = random_prompts(40)
    thinking = Thinking(mode=mode, max_path_tokens=8, max_response_tokens=60)
    ends = tuple(range(20, 30))
    tags = replace(TAGS, more_eos=ends)
    thinker = Thinker(native_engine(MODEL), tags, thinking)
    stopped = asyncio.run(roll_out(thinker, prompts, list(range(len(prompts)))))
    ended = [trace for trace in stopped if trace.finish == "eos"]
    assert {TAGS.eos, *ends} >= {trace.tokens[-1] for trace in ended} and len(ended) > 20
    assert any(trace.tokens[-1] in ends and trace.sampled[-1] for trace in ended)
    for trace, free in zip(stopped, traces_of(native_engine(MODEL), thinking, prompts), strict=True):
        if not trace.tree.blocks:
            assert not set(trace.tokens[:-1]) & set(ends)
            assert free.tokens[: len(trace.tokens)] == trace.tokens
