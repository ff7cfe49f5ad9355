"""What the listening engine hears is the trace, in every mode, and the script puts it in order."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from megatron_parallel_r1.data.prompts import decode
from megatron_parallel_r1.rollout.engine import Interrupted
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.rollout.thinking import Thinker
from megatron_parallel_r1.serve.response_assembler import Script
from megatron_parallel_r1.serve.token_stream import ListeningEngine, Place
from megatron_parallel_r1.thought.layout import Mode, critical_length
from megatron_parallel_r1.thought.trace import Trace
from tests.reference.traces import TAGS
from tests.serve.release import THINKING, tokenizer
from tests.unit.rollout.tiny import native_engine, tiny_qwen3

ENGINE = native_engine(tiny_qwen3())
TOKENIZER = tokenizer()
PROMPT = [9, 10]


async def listened(thinking: Thinking, seed: int, script: Script) -> Trace:
    listening = ListeningEngine(ENGINE, TAGS, script.hear)
    opened = ENGINE.open()
    await ENGINE.write(opened, PROMPT)
    trace = await Thinker(listening, TAGS, thinking).trace(PROMPT, listening.prompt(opened), seed)
    ENGINE.close(opened)
    script.end(trace.finish)
    return trace


async def plain(thinking: Thinking, seed: int) -> Trace:
    opened = ENGINE.open()
    await ENGINE.write(opened, PROMPT)
    trace = await Thinker(ENGINE, TAGS, thinking).trace(PROMPT, opened, seed)
    ENGINE.close(opened)
    return trace


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("mode", ["isolated", "replay", "causal", "sequential"])
def test_a_script_is_its_trace(mode: Mode, depth: int) -> None:
    thinking = replace(THINKING, mode=mode, max_depth=depth, max_response_tokens=110)
    blocks = nested = cut = 0
    for seed in range(16):
        script = Script(TOKENIZER, TAGS)
        trace = asyncio.run(listened(thinking, seed, script))
        assert trace == asyncio.run(plain(thinking, seed)), "listening changed what was thought"
        assert tuple(script.tokens) == trace.tokens
        assert script.take().content == decode(TOKENIZER, trace.tokens)
        assert script.critical_tokens == critical_length(trace.tree)
        assert len(script.thoughts()["blocks"]) == len(trace.tree.blocks)
        blocks += len(trace.tree.blocks)
        nested += trace.tree.depth > 1
        cut += trace.finish == "length"
    assert ENGINE._table.used == 0
    assert (blocks > 10) == (mode != "sequential")
    assert (nested > 0) == (mode != "sequential" and depth > 1)
    assert mode == "sequential" or depth == 1 or cut > 0


def test_paths_are_told_side_by_side() -> None:
    """Each pass of the model tells one token of every path that still runs."""
    heard: list[Place] = []

    class Noting(Script):
        def hear(self, place: Place, token: int) -> None:
            heard.append(place)
            super().hear(place, token)

    trace = asyncio.run(listened(THINKING, 0, Noting(TOKENIZER, TAGS)))
    lengths = [path.stop - path.start for path in trace.tree.blocks[0].paths]
    shortest = min(lengths)
    assert shortest > 1
    in_paths = [place for place in heard if len(place) == 2 and place[0] == 1]
    together = in_paths[: len(lengths) * shortest]
    turns = [set(together[i : i + len(lengths)]) for i in range(0, len(together), len(lengths))]
    assert turns == [{(1, index) for index in range(len(lengths))}] * shortest


def test_what_is_cut_short_leaves_nothing_open() -> None:
    async def cut(passes: int) -> bool:
        script = Script(TOKENIZER, TAGS)
        listening = ListeningEngine(ENGINE, TAGS, script.hear)
        opened = ENGINE.open()
        await ENGINE.write(opened, PROMPT)
        thinker = Thinker(listening, TAGS, replace(THINKING, max_depth=2))
        thinking = asyncio.ensure_future(thinker.trace(PROMPT, listening.prompt(opened), 3))
        for _ in range(passes):
            await asyncio.sleep(0)
        running = not thinking.done()
        thinking.cancel()
        await asyncio.wait([thinking])
        listening.close_all()
        ENGINE.close(opened)
        with pytest.raises(Interrupted):
            await listening.write(listening.prompt(opened), ())
        return running

    assert sum(asyncio.run(cut(passes)) for passes in range(0, 400, 7)) > 20
    assert ENGINE._table.used == 0
    rows = ENGINE._table._free_rows
    assert len(set(rows)) == len(rows) == len(ENGINE._table.lengths_C), "a context was closed twice or not"
