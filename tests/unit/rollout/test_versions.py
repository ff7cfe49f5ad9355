"""Which weights drew which token, when new ones come while contexts are open.

The referee is `transformers` with a key/value cache that the old weights filled. Teams: tests/parallel.
"""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch
from transformers import DynamicCache, Qwen3ForCausalLM

from megatron_parallel_r1.rollout.engine import Completion, Interrupted, Sampling
from megatron_parallel_r1.rollout.native.engine import NativeEngine
from megatron_parallel_r1.rollout.native.page_table import NativeContext
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.rollout.thinking import Thinker, roll_out
from megatron_parallel_r1.thought.trace import Trace
from megatron_parallel_r1.thought.tree import Tree
from tests.reference.traces import TAGS
from tests.unit.rollout.tiny import native_engine, random_prompts, tiny_qwen3, traces_of

OLD, NEW = tiny_qwen3(seed=0), tiny_qwen3(seed=1)
TOLERANCE = 2e-5  # float32, logits of some units: a few hundred roundings of 6e-8
PROMPT = [9, 10, 11]


async def drawn(engine: NativeEngine, context: NativeContext, count: int) -> Completion:
    return await engine.sample(context, Sampling(seed=5), count, frozenset(), frozenset())


def offer(engine: NativeEngine, model: Qwen3ForCausalLM, version: int) -> None:
    engine.offer_weights(model.state_dict().items(), version)


@torch.no_grad()
def continued(parts: list[tuple[Qwen3ForCausalLM, list[int]]]) -> list[float]:
    """Log-probs of each token but the first, each part of the text gone through with its own weights."""
    cache, logprobs_TV = DynamicCache(), []
    for model, tokens in parts:
        out = model(input_ids=torch.tensor([tokens]), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logprobs_TV.append(out.logits[0].log_softmax(-1))
    text = torch.tensor([token for _, tokens in parts for token in tokens])
    return torch.cat(logprobs_TV)[:-1].gather(1, text[1:, None])[:, 0].tolist()


def test_a_cache_of_old_weights_goes_on_under_new_ones() -> None:
    async def write() -> tuple[Completion, Completion]:
        context = engine.open()
        await engine.write(context, PROMPT)
        before = await drawn(engine, context, 6)
        offer(engine, NEW, version=1)
        return before, await drawn(engine, context, 6)

    engine = native_engine(OLD)
    before, after = asyncio.run(write())
    assert before.versions == (0,) * 6 and after.versions == (1,) * 6
    # The last token before the change was not in the cache yet.
    old = [*PROMPT, *before.tokens[:-1]]
    expected = continued([(OLD, old), (NEW, [before.tokens[-1], *after.tokens])])[len(PROMPT) - 1 :]
    assert [*before.logprobs, *after.logprobs] == pytest.approx(expected, abs=TOLERANCE)
    unchanged = continued([(OLD, [*old, before.tokens[-1], *after.tokens])])[-6:]
    assert max(abs(a - b) for a, b in zip(unchanged, after.logprobs, strict=True)) > 0.1


def test_a_token_has_the_version_of_its_distribution() -> None:
    async def write() -> Completion:
        context = engine.open()
        await engine.write(context, PROMPT)
        fork = engine.fork(context)
        offer(engine, NEW, version=1)
        return await drawn(engine, fork, 3)

    engine = native_engine(OLD)
    completion = asyncio.run(write())
    # The first is drawn from what `write` left.
    assert completion.versions == (0, 1, 1)
    tokens = completion.tokens
    expected = continued([(OLD, PROMPT), (NEW, list(tokens))])[len(PROMPT) - 1 :]
    assert completion.logprobs == pytest.approx(expected, abs=TOLERANCE)


def test_the_newest_offer_is_taken_and_a_later_load_needs_closed_contexts() -> None:
    async def write() -> NativeContext:
        context = engine.open()
        await engine.write(context, PROMPT)
        return context

    engine = native_engine(OLD)
    for version in (1, 3, 2):
        offer(engine, NEW if version == 3 else OLD, version)
    assert engine.version == 0, "weights change at a pass, not in the caller's thread"
    context = asyncio.run(write())
    assert engine.version == context.version == 3
    expected_V = native_engine(NEW)
    assert torch.equal(context.logits_V, asyncio.run(logits(expected_V)))
    with pytest.raises(RuntimeError, match="3 cache slots are in use"):
        engine.load_weights(OLD.state_dict().items(), version=4)


async def logits(engine: NativeEngine) -> torch.Tensor:
    context = engine.open()
    await engine.write(context, PROMPT)
    assert context.logits_V is not None
    return context.logits_V


def test_an_engine_may_begin_with_an_offer() -> None:
    engine = native_engine(OLD)
    fresh = NativeEngine(engine._config)
    offer(fresh, OLD, version=0)
    thinking = Thinking(max_path_tokens=10, max_response_tokens=60)
    prompts = random_prompts(6)
    assert traces_of(fresh, thinking, prompts) == traces_of(engine, thinking, prompts)


@pytest.mark.parametrize("mode", ["isolated", "replay", "causal"])
def test_traces_cross_an_update_and_say_where(mode: str) -> None:
    thinking = Thinking(mode=mode, max_depth=2, max_path_tokens=15, max_response_tokens=90)
    prompts = random_prompts(24)

    async def write() -> list[Trace]:
        async def change() -> None:
            while engine.computed_tokens < 400:
                await asyncio.sleep(0)
            offer(engine, NEW, version=7)

        changing = asyncio.ensure_future(change())
        traces = await roll_out(Thinker(engine, TAGS, thinking), prompts, list(range(24)))
        await changing
        return traces

    engine = native_engine(OLD)
    found = asyncio.run(write())
    quiet = traces_of(native_engine(OLD), thinking, prompts)
    kinds = {frozenset(trace.versions) for trace in found}
    assert kinds >= {frozenset({0}), frozenset({0, 7})}, "the change came before or after everything"
    for trace, undisturbed in zip(found, quiet, strict=True):
        assert set(trace.versions) <= {0, 7} and set(undisturbed.versions) == {0}
        if set(trace.versions) == {0}:
            assert trace == undisturbed
        else:
            assert trace.version == 0
        if not trace.tree.blocks:
            assert list(trace.versions) == sorted(trace.versions)
    assert any(len({*t.versions[b.start : b.summary.start]}) == 2 for t in found for b in closed_blocks(t))


def closed_blocks(trace: Trace) -> list:
    return [block for _, block in trace.tree.all_blocks() if block.summary is not None]


def test_the_version_of_a_trace_is_its_oldest_drawn_token() -> None:
    def trace(versions: tuple[int, ...]) -> Trace:
        sampled = (True, False, True)
        return Trace((7,), (8, 8, 8), sampled, (False,) * 3, (-1.0,) * 3, "eos", Tree(3), versions)

    assert trace((4, 1, 3)).version == 3
    assert trace(()).version == 0
    with pytest.raises(AssertionError):
        trace((1, 2))


def test_an_interrupt_ends_what_another_thread_asked_for() -> None:
    engine = native_engine(OLD)

    async def write() -> None:
        context = engine.open()
        await engine.write(context, PROMPT)
        await drawn(engine, context, 10**9)

    def interrupt() -> None:
        while not engine.computed_tokens:
            pause.wait(0.01)
        engine.interrupt()

    pause = threading.Event()
    other = threading.Thread(target=interrupt)
    other.start()
    with pytest.raises(Interrupted):
        asyncio.run(write())
    other.join()
    with pytest.raises(Interrupted):
        asyncio.run(write())
