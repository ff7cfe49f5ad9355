from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_parallel_r1.rewards.path_diversity import (
    block_difference,
    content_span,
    path_difference,
    trace_difference,
)
from megatron_parallel_r1.thought.parser import parse
from megatron_parallel_r1.thought.tags import Tags

TAGS = Tags(parallel=1, parallel_end=2, path=3, path_end=4, summary=5, summary_end=6, eos=0)
SEQUENCES = st.lists(st.integers(7, 10), max_size=12)


@pytest.mark.parametrize(
    ("one", "other", "value"),
    [
        ([], [], 0.0),
        ([], [7], 1.0),
        ([7, 8, 9], [7, 8, 9], 0.0),
        ([7, 8], [8, 7], 1.0),  # no common bigram
        ([7, 8, 9], [7, 8, 8, 9], 1 - 2 * 3 / 7),  # begin-7, 7-8 and 8-9 of 3 and 4
        ([7, 8, 7, 8], [7, 8], 1 - 2 * 2 / 6),  # 7-8 twice here and once there
        ([7, 9], [7, 8], 0.5),  # the first token alone
    ],
)
def test_two_sequences_by_hand(one: list[int], other: list[int], value: float) -> None:
    assert path_difference(one, other) == path_difference(other, one) == pytest.approx(value, abs=1e-15)


@given(SEQUENCES, SEQUENCES)
def test_difference_is_0_for_equals_and_within_0_and_1(one: list[int], other: list[int]) -> None:
    assert path_difference(one, one) == 0.0
    assert 0.0 <= path_difference(one, other) <= 1.0


def test_a_trace_by_hand() -> None:
    #         P  <7 8>        <7 9>        <>    /P S  /S
    first = [1, 3, 7, 8, 4, 3, 7, 9, 4, 3, 4, 2, 5, 7, 6]
    single = [1, 3, 7, 4, 2, 5, 6]
    second = [1, 3, 7, 8, 4, 3, 7, 8, 4, 2, 5, 6]
    tokens = [9, *first, *single, *second, 0]
    tree = parse(tokens, TAGS)
    blocks = [block_difference(tokens, block) for block in tree.blocks]
    assert blocks == [pytest.approx((0.5 + 1 + 1) / 3), None, 0.0]
    assert trace_difference(tokens, tree) == pytest.approx(2.5 / 6)
    assert trace_difference(single, parse(single, TAGS)) is None
    assert trace_difference([9, 0], parse([9, 0], TAGS)) is None


def test_nested_blocks_and_a_cut_path_count() -> None:
    tokens = [
        1,
        3,
        1,
        3,
        7,
        4,
        3,
        8,
        4,
        2,
        5,
        6,
        4,
        3,
        7,
        8,
    ]  # the inner block differs wholly, so do the outer paths
    tree = parse(tokens, TAGS)
    (outer,) = tree.blocks
    assert [content_span(path) for path in outer.paths] == [(2, 12), (14, 16)]
    assert trace_difference(tokens, tree) == 1.0


def test_time_is_linear_in_tokens() -> None:
    paths = [token for k in range(8) for token in (3, *(7 + (i * (k + 1)) % 997 for i in range(25_000)), 4)]
    tokens = [1, *paths, 2, 5, 6]
    tree = parse(tokens, TAGS)
    start = time.process_time()
    assert 0.9 < (trace_difference(tokens, tree) or 0.0) <= 1.0
    assert time.process_time() - start < 5.0  # 0.1 s here; quadratic would be minutes
