"""Decoding on filled-up shapes is decoding; the graphs that replay them on a GPU are not made here."""

from __future__ import annotations

import pytest

from megatron_parallel_r1.rollout.native import graphs
from megatron_parallel_r1.rollout.native.page_table import PageTable
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.thought.trace import Trace
from tests.unit.rollout.test_exactness import TOLERANCE, largest_difference
from tests.unit.rollout.tiny import native_engine, random_prompts, tiny_qwen3, traces_of

THINKING = Thinking(max_blocks=3, max_depth=2, max_path_tokens=20, max_response_tokens=110)


def traces(recurring: bool, prompts: list[list[int]] | None = None) -> list[Trace]:
    engine = native_engine(tiny_qwen3(), recurring=recurring)
    return traces_of(engine, THINKING, prompts or random_prompts(24))


def test_filled_up_passes_draw_what_others_draw() -> None:
    plain, filled = traces(False), traces(True)
    assert [trace.tokens for trace in filled] == [trace.tokens for trace in plain]
    assert largest_difference(tiny_qwen3(), filled, "isolated") <= TOLERANCE


def test_a_cache_that_grows_on_the_way_is_followed() -> None:
    prompts = random_prompts(24)
    slots = sum(map(len, prompts)) + 10  # The prompts fit; their first drawn tokens do not.
    model, engine = tiny_qwen3(), native_engine(tiny_qwen3(), recurring=True)
    engine._table = PageTable(slots=slots)
    engine.load_weights(model.state_dict().items(), version=1)
    filled = traces_of(engine, THINKING, prompts)
    assert engine._table.slot_count > slots
    assert [trace.tokens for trace in filled] == [trace.tokens for trace in traces(False, prompts)]


def test_each_size_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[tuple[int, int]] = []

    class Counted(graphs._GraphBuffers):
        def __init__(self, model: graphs.DecodeModel, rows: int, length: int) -> None:
            captured.append((rows, length))
            super().__init__(model, rows, length)

    monkeypatch.setattr(graphs, "_GraphBuffers", Counted)
    traces(True)
    assert len(captured) == len(set(captured)) >= 3
    assert {rows for rows, _ in captured} <= {8, 16, 32, 64, 128} and {length for _, length in captured} == {
        128
    }


@pytest.mark.parametrize(("count", "filled"), [(1, 8), (8, 8), (9, 16), (64, 64), (65, 128)])
def test_sizes_are_powers_of_two(count: int, filled: int) -> None:
    assert graphs._padded(count, 8) == filled
