"""Shares of a batch: nothing lost, nothing twice, nearly equal, of lengths that can be split."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_parallel_r1.thought.layout import Row, lay_out
from megatron_parallel_r1.thought.packing import balanced_partition
from megatron_parallel_r1.thought.tree import Tree
from megatron_parallel_r1.train.micro_batch import BatchPartition, partition_rows


def row_of(length: int) -> Row:
    """A chain of `length` tokens behind a prompt of one; its tokens tell rows apart."""
    tree = Tree(length=length, blocks=())
    return lay_out([0], [length] * length, [True] * length, tree, "sequential")


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 6))
def test_a_deal_is_a_partition_into_hands_that_differ_by_at_most_one_row(sizes, hands) -> None:
    dealt = balanced_partition(sizes, hands)
    assert sorted(index for hand in dealt for index in hand) == list(range(len(sizes)))
    sums = [sum(sizes[index] for index in hand) for hand in dealt]
    # The last row put on the fullest hand went where least was: without it, it is not above any other.
    assert max(sums) - min(sums) <= max(sizes)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=20),
    st.integers(1, 4),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 2]),
)
def test_shares_of_all_processes_hold_each_target_once(lengths, data, context, tensor, rounds) -> None:
    rows = [row_of(length) for length in lengths]
    multiple = (2 * context if context > 1 else 1) * tensor
    labels: list[int] = []
    counts = set()
    for data_rank in range(data):
        for context_rank in range(context):
            place = BatchPartition(data_rank, data, context_rank, context, multiple, rounds)
            own = partition_rows(rows, 12 * 5, place)
            counts.add(len(own))
            for row in own:
                assert len(row) > 0 and len(row) * context % multiple == 0
                labels += row.labels_L[row.labels_L >= 0].tolist()
            if rounds > 1:
                assert len({len(row) for row in own}) == 1
    assert len(counts) == 1 and counts.pop() % rounds == 0
    assert sorted(labels) == sorted(length for length in lengths for _ in range(length))


def test_token_counts_are_balanced() -> None:
    generator = np.random.default_rng(0)
    rows = [row_of(int(length)) for length in generator.integers(20, 400, 64)]
    shares = [partition_rows(rows, 2000, BatchPartition(data=rank, data_size=4)) for rank in range(4)]
    tokens = [sum(map(len, share)) for share in shares]
    assert max(tokens) <= 1.02 * sum(tokens) / 4, tokens
