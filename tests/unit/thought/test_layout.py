from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_parallel_r1.thought.layout import critical_length, lay_out, row_length
from megatron_parallel_r1.thought.packing import PackedRow, concatenate, pack, pad
from megatron_parallel_r1.thought.parser import parse
from tests.reference.dense import (
    isolated_position,
    isolated_sees,
    row_sees,
    stock_contexts,
)
from tests.reference.traces import TAGS, random_trace

PROMPT = [20, 21, 22]
seeds = st.integers(0, 10**6)


def alone(trace: list[int], mode: str) -> PackedRow:
    tree = parse(trace, TAGS)
    sampled = [index not in tree.forced() for index in range(len(trace))]
    return concatenate([lay_out(PROMPT, trace, sampled, tree, mode)], [0])


def test_isolated_by_hand() -> None:
    # t P p a /p p b c /p /P S s /S
    trace = [9, 0, 2, 10, 3, 2, 11, 12, 3, 1, 4, 13, 5]
    packed = alone(trace, "isolated")
    assert packed.positions_L[3:].tolist() == [3, 4, 5, 6, 7, 5, 6, 7, 8, 9, 10, 11, 12]
    assert packed.layout_KL[2:, 3:].tolist() == [
        [0, 0, 0, 0, 0, 5, 5, 5, 5, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 8, 8, 8, 8, 0, 0, 0, 0],
    ]
    labels = [9, 0, -1, 10, 3, -1, 11, 12, 3, -1, -1, 13, 5]
    assert packed.labels_L[2:-1].tolist() == labels and packed.labels_L[-1] == -1
    assert critical_length(parse(trace, TAGS)) == 10


def test_replay_by_hand() -> None:
    trace = [0, 2, 10, 3, 2, 11, 3, 1, 4, 5]  # P p a /p p b /p /P S /S
    packed = alone(trace, "replay")
    assert packed.tokens_L.tolist() == [*PROMPT, *trace, 2, 11, 3]
    assert packed.positions_L.tolist() == [*range(13), 4, 5, 6]
    assert packed.layout_KL[2:, 13:].tolist() == [[4, 4, 4], [13, 13, 13]]
    assert packed.source_L.tolist() == [-1, -1, 0, -1, 2, 3, -1, -1, -1, -1, -1, 9, -1, 5, 6, -1]


@given(seeds, st.booleans(), st.sampled_from(["isolated", "replay", "causal"]))
def test_a_rows_length_is_known_before_it_is_laid_out(seed: int, truncate: bool, mode: str) -> None:
    trace = random_trace(seed, truncate=truncate)
    tree = parse(trace, TAGS)
    assert row_length(len(PROMPT), tree, mode) == len(alone(trace, mode))


@given(seeds, st.booleans())
def test_isolated_layout_is_its_definition(seed: int, truncate: bool) -> None:
    trace = random_trace(seed, truncate=truncate)
    tree, packed = parse(trace, TAGS), alone(trace, "isolated")
    expected = np.tril(np.ones((len(packed), len(packed)), bool))
    expected[3:, 3:] = isolated_sees(tree)
    assert (row_sees(packed) == expected).all()
    assert packed.positions_L[3:].tolist() == [3 + p for p in isolated_position(tree)]


@given(seeds, st.booleans(), st.sampled_from(["replay", "causal", "isolated"]))
def test_each_loss_token_stands_once_and_sees_what_its_author_saw(
    seed: int, truncate: bool, mode: str
) -> None:
    trace = random_trace(seed, truncate=truncate)
    tree, packed = parse(trace, TAGS), alone(trace, mode)
    sources = packed.source_L[packed.source_L >= 0].tolist()
    assert sorted(sources) == [i for i in range(len(trace)) if i not in tree.forced()]
    sees = row_sees(packed)
    contexts = {"replay": stock_contexts(tree), "causal": [list(range(i)) for i in range(len(trace))]}
    for index in np.flatnonzero(packed.source_L >= 0):
        assert packed.labels_L[index] == trace[packed.source_L[index]]
        if mode == "isolated":
            continue
        context = [trace[i] for i in contexts[mode][packed.source_L[index]]]
        seen = np.flatnonzero(sees[index])
        assert packed.tokens_L[seen].tolist() == [*PROMPT, *context]
        assert packed.positions_L[seen].tolist() == list(range(len(seen)))
        # What it sees saw the same things in turn, so that hidden states agree too.
        for rank, key in enumerate(seen):
            assert np.flatnonzero(sees[key]).tolist() == seen[: rank + 1].tolist()


@given(st.lists(seeds, min_size=1, max_size=6), st.sampled_from(["replay", "isolated"]))
def test_packing_shows_each_trace_only_itself(trace_seeds: list[int], mode: str) -> None:
    traces = [random_trace(seed, depth=2) for seed in trace_seeds]
    trees = [parse(trace, TAGS) for trace in traces]
    rows = [
        lay_out(PROMPT, trace, [True] * len(trace), tree, mode)
        for trace, tree in zip(traces, trees, strict=True)
    ]
    packed_rows = pack(rows, capacity=120)
    assert sorted(m for packed in packed_rows for m in packed.segment_ids) == list(range(len(rows)))
    for packed in packed_rows:
        sees, start = row_sees(packed), 0
        assert len(packed) <= 120 or len(packed.segment_ids) == 1
        for place, segment_id in enumerate(packed.segment_ids):
            single = concatenate(rows, [segment_id])
            here = slice(start, start + len(single))
            assert (sees[here, here] == row_sees(single)).all()
            assert sees[here].sum() == row_sees(single).sum()
            assert (packed.labels_L[here] == single.labels_L).all()
            assert (packed.positions_L[here] == single.positions_L).all()
            assert (packed.segment_L[here] == np.where(single.source_L >= 0, place, -1)).all()
            start += len(single)
        values = [[1000.0 * m + i for i in range(len(trace))] for m, trace in enumerate(traces)]
        gathered = packed.gather(values)
        for index in np.flatnonzero(packed.labels_L >= 0):
            segment_id = packed.segment_ids[packed.segment_L[index]]
            assert gathered[index] == values[segment_id][packed.source_L[index]]
        assert (gathered[packed.labels_L < 0] == 0).all()


def test_sequential_refuses_blocks() -> None:
    tree = parse([0, 2, 3, 1, 4, 5], TAGS)
    with pytest.raises(ValueError, match="no blocks"):
        lay_out(PROMPT, [0, 2, 3, 1, 4, 5], [True] * 6, tree, "sequential")


@given(seeds, st.integers(1, 9))
def test_padding_changes_nothing_for_the_row(seed: int, multiple: int) -> None:
    packed = alone(random_trace(seed, depth=2), "isolated")
    filled = pad(packed, multiple)
    assert len(filled) % multiple == 0 and len(filled) - len(packed) < multiple
    sees, length = row_sees(filled), len(packed)
    assert (sees[:length, :length] == row_sees(packed)).all() and not sees[:length, length:].any()
    assert (sees[length:].sum(1) == 1).all() and sees.diagonal().all()
    assert filled.target_count == packed.target_count
    assert filled.gather([range(500)])[:length].tolist() == packed.gather([range(500)]).tolist()
