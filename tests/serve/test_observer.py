"""The thinking loop shows an observer the whole trace, in every mode; the assembler puts it in order."""

from __future__ import annotations

import asyncio

import pytest

from megatron_parallel_r1.data.prompts import decode
from megatron_parallel_r1.rollout.engine import TokenScore
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.rollout.thinking import FORCED, Branch, Thinker
from megatron_parallel_r1.serve.response_assembler import ResponseAssembler
from megatron_parallel_r1.thought.layout import Mode, critical_length
from megatron_parallel_r1.thought.trace import Trace
from tests.reference.formats import ALL, tags_of
from tests.reference.traces import TAGS
from tests.serve.release import THINKING, tokenizer
from tests.unit.rollout.tiny import eager_of, native_engine, tiny_qwen3

ENGINE = native_engine(tiny_qwen3())
TOKENIZER = tokenizer()
PROMPT = [9, 10]


async def observed(thinking: Thinking, seed: int, response: ResponseAssembler) -> Trace:
    opened = ENGINE.open()
    await ENGINE.write(opened, PROMPT)
    trace = await Thinker(ENGINE, TAGS, thinking).trace(PROMPT, opened, seed, observe=response.add)
    ENGINE.close(opened)
    response.end(trace.finish)
    return trace


async def plain(thinking: Thinking, seed: int) -> Trace:
    opened = ENGINE.open()
    await ENGINE.write(opened, PROMPT)
    trace = await Thinker(ENGINE, TAGS, thinking).trace(PROMPT, opened, seed)
    ENGINE.close(opened)
    return trace


@pytest.mark.parametrize("depth", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("mode", ["isolated", "replay", "causal", "sequential"])
def test_an_assembled_response_is_its_trace(mode: Mode, depth: int) -> None:
    thinking = THINKING.replace(mode=mode, max_depth=depth, max_response_tokens=110)
    blocks = nested = cut = 0
    for seed in range(16):
        response = ResponseAssembler(TOKENIZER, TAGS)
        trace = asyncio.run(observed(thinking, seed, response))
        assert trace == asyncio.run(plain(thinking, seed)), "the observer changed the trace"
        assert tuple(response.tokens) == trace.tokens
        assert response.take_delta().content == decode(TOKENIZER, trace.tokens)
        assert response.critical_tokens == critical_length(trace.tree)
        assert len(response.parallel()["blocks"]) == len(trace.tree.blocks)
        blocks += len(trace.tree.blocks)
        nested += trace.tree.depth > 1
        cut += trace.finish == "length"
    assert ENGINE._table.used == 0
    assert (blocks > 10) == (mode != "sequential")
    assert (nested > 0) == (mode != "sequential" and depth > 1)
    assert mode == "sequential" or depth == 1 or cut > 0


@pytest.mark.parametrize("name", sorted(ALL.keys() - {"parallel_r1"}))
def test_a_response_of_any_format_is_assembled(name: str) -> None:
    tags, blocks = tags_of(ALL[name]), 0
    engine = native_engine(tiny_qwen3(eager=eager_of(tags)))
    thinking = THINKING.replace(paths=2, max_depth=2, max_path_tokens=60, max_response_tokens=180)

    async def observed_one(seed: int, response: ResponseAssembler) -> Trace:
        opened = engine.open()
        await engine.write(opened, PROMPT)
        return await Thinker(engine, tags, thinking).trace(PROMPT, opened, seed, observe=response.add)

    for seed in range(3):
        response = ResponseAssembler(TOKENIZER, tags)
        trace = asyncio.run(observed_one(seed, response))
        assert response.tokens == list(trace.tokens)[: len(response.tokens)], (
            "the flat text waits for nothing"
        )
        response.end(trace.finish)
        assert tuple(response.tokens) == trace.tokens
        assert response.critical_tokens == critical_length(trace.tree)
        shown = response.parallel()["blocks"]
        assert [len(block["paths"]) for block in shown] == [len(b.paths) for b in trace.tree.blocks]
        assert all((block["summary"] is None) == (tags.summary is None) for block in shown)
        blocks += len(shown)
    assert blocks >= 1


def test_paths_are_observed_side_by_side() -> None:
    """Each forward pass shows one token of every path that still runs."""
    seen: list[Branch] = []

    class Recording(ResponseAssembler):
        def add(self, branch: Branch, token: int, score: TokenScore = FORCED) -> None:
            seen.append(branch)
            super().add(branch, token, score)

    trace = asyncio.run(observed(THINKING, 0, Recording(TOKENIZER, TAGS)))
    lengths = [path.stop - path.start for path in trace.tree.blocks[0].paths]
    shortest = min(lengths)
    assert shortest > 1
    in_paths = [branch for branch in seen if len(branch) == 2 and branch[0] == 1]
    together = in_paths[: len(lengths) * shortest]
    turns = [set(together[i : i + len(lengths)]) for i in range(0, len(together), len(lengths))]
    assert turns == [{(1, index) for index in range(len(lengths))}] * shortest


def test_a_cancelled_trace_leaves_nothing_open() -> None:
    async def cut(passes: int) -> bool:
        response = ResponseAssembler(TOKENIZER, TAGS)
        opened = ENGINE.open()
        await ENGINE.write(opened, PROMPT)
        thinker = Thinker(ENGINE, TAGS, THINKING.replace(max_depth=2))
        thinking = asyncio.ensure_future(thinker.trace(PROMPT, opened, 3, observe=response.add))
        for _ in range(passes):
            await asyncio.sleep(0)
        running = not thinking.done()
        thinking.cancel()
        await asyncio.wait([thinking])
        assert asyncio.all_tasks() <= {asyncio.current_task(), ENGINE._driver}, "a path still runs"
        ENGINE.close(opened)
        return running

    assert sum(asyncio.run(cut(passes)) for passes in range(0, 400, 7)) > 20
    assert ENGINE._table.used == 0
    rows = ENGINE._table._free_rows
    assert len(set(rows)) == len(rows) == len(ENGINE._table.lengths_C), "a context was closed twice or not"
