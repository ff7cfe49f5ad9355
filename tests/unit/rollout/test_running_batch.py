"""Calls kept as columns do what a list of calls, one object each, does; a cancelled call leaves."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_parallel_r1.rollout.engine import Completion, Sampling
from megatron_parallel_r1.rollout.native.engine import NativeEngine
from megatron_parallel_r1.rollout.native.page_table import ForwardBatch, NativeContext
from megatron_parallel_r1.rollout.native.running_batch import RunningBatch, SampleCall
from tests.unit.rollout.tiny import native_engine, tiny_qwen3

SETS = [frozenset(), frozenset({3}), frozenset({1, 4, 7})]
NONE: frozenset[int] = frozenset()


@dataclass(eq=False)
class Plain:
    """One call, from the definition."""

    call: SampleCall
    pending: bool
    position: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)

    def takes(self, token: int, logprob: float, version: int) -> Completion | None:
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.versions.append(version)
        self.pending = True
        stopped = token in self.call.stop
        if not stopped and len(self.tokens) < self.call.limit:
            return None
        return Completion(tuple(self.tokens), tuple(self.logprobs), tuple(self.versions), stopped)


def make_call(data: st.DataObject, loop: asyncio.AbstractEventLoop, row: int) -> SampleCall:
    pending = [data.draw(st.integers(0, 9))] if data.draw(st.booleans()) else []
    context = NativeContext(row, data.draw(st.integers(0, 50)), pending)
    limit, stop, suppress = (
        data.draw(expected_draw)
        for expected_draw in (st.integers(1, 40), st.sampled_from(SETS), st.sampled_from(SETS))
    )
    return SampleCall(context, loop.create_future(), Sampling(seed=row), limit, stop, suppress)


@given(st.data())
def test_columns_are_the_calls(data: st.DataObject) -> None:
    loop = asyncio.new_event_loop()
    batch, plain, rows = RunningBatch(), [], 0
    for step in range(data.draw(st.integers(1, 60))):
        newcomers = [make_call(data, loop, rows + index) for index in range(data.draw(st.integers(0, 3)))]
        rows += len(newcomers)
        batch.admit(newcomers)
        plain += [Plain(call, bool(call.context.pending), call.context.position) for call in newcomers]
        if plain and data.draw(st.integers(0, 9)) == 0:
            plain.pop(data.draw(st.integers(0, len(plain) - 1))).call.done.cancel()
            batch.remove_cancelled()
        waiting = batch.waiting()[: data.draw(st.integers(0, 8))]
        batch.advance(waiting)
        chosen = np.concatenate([waiting, batch.without_token()])
        for index in waiting:
            plain[index].position += 1
        if not len(chosen):
            continue
        suppressed = sorted((i, token) for i, n in enumerate(chosen) for token in plain[n].call.suppress)
        assert sorted(zip(*map(np.ndarray.tolist, batch.suppressed(chosen)), strict=True)) == suppressed
        tokens = np.array([data.draw(st.integers(0, 9)) for _ in chosen])
        logprobs = -np.arange(len(chosen)) - step / 7
        completions = batch.record(chosen, tokens, logprobs, np.full(len(chosen), step))
        expected = {}
        for index, token, logprob in zip(chosen.tolist(), tokens.tolist(), logprobs.tolist(), strict=True):
            if completion := plain[index].takes(token, logprob, step):
                expected[plain[index].call] = (completion, plain[index])
        assert dict(completions) == {call: pair[0] for call, pair in expected.items()}
        for call, (completion, expected_draw) in expected.items():
            assert call.context.position == expected_draw.position and call.context.pending == [
                completion.tokens[-1]
            ]
            plain.remove(expected_draw)
        assert batch.columns_N["row"].tolist() == [expected_draw.call.context.row for expected_draw in plain]
        assert batch.columns_N["position"].tolist() == [expected_draw.position for expected_draw in plain]
    assert {call.context.row for call in batch.calls} == {
        expected_draw.call.context.row for expected_draw in plain
    }
    loop.close()


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 64))
def test_groups_hold_all_rows_and_few_cells(lengths: list[int], most: int) -> None:
    numbers = np.arange(len(lengths))
    rows = ForwardBatch(numbers, numbers, numbers, np.zeros((len(lengths), 30), np.int64), np.array(lengths))
    ordered, places = rows.longest_first()
    assert ordered.tokens_N[places].tolist() == numbers.tolist()
    assert ordered.lengths_N.tolist() == sorted(lengths, reverse=True)
    groups = ordered.groups(most)
    assert [start for start, _, _ in groups] == [0, *(stop for _, stop, _ in groups[:-1])]
    assert groups[-1][1] == len(lengths)
    for start, stop, longest in groups:
        assert longest == ordered.lengths_N[start:stop].max()
        assert (stop - start) * longest <= most or stop == start + 1


def test_a_cancelled_call_leaves_and_others_draw_what_they_would() -> None:
    async def drawn(engine: NativeEngine, cancel: bool) -> Completion:
        contexts = [engine.open() for _ in range(3)]
        for context in contexts:
            await engine.write(context, [9, 10])
        calls = [
            asyncio.ensure_future(engine.sample(context, Sampling(seed=index), 30, NONE, NONE))
            for index, context in enumerate(contexts)
        ]
        while engine.computed_tokens < 15:
            await asyncio.sleep(0)
        if cancel:
            calls[0].cancel()
            with pytest.raises(asyncio.CancelledError):
                await calls[0]
            engine.close(contexts[0])
            # Takes the row that was just given back.
            await engine.write(engine.open(), [9])
        return await calls[2]

    model = tiny_qwen3()
    disturbed, quiet = (asyncio.run(drawn(native_engine(model), cancel)) for cancel in (True, False))
    assert disturbed.tokens == quiet.tokens
    assert disturbed.logprobs == pytest.approx(quiet.logprobs, abs=2e-6)  # Other rows, other roundings.
