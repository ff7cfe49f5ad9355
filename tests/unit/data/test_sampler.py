"""Order and resumption of problem streams."""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_parallel_r1.data.embedded.generate import training_problem
from megatron_parallel_r1.data.sampler import MixedOrder, ProblemStream, ShuffledEpochs


@given(
    size=st.integers(1, 20),
    seed=st.integers(),
    batches=st.lists(st.integers(0, 9), min_size=1, max_size=8),
)
def test_resumed_stream_equals_the_one_never_stopped(size: int, seed: int, batches: list[int]) -> None:
    whole = ProblemStream(range(size), seed).next_batch(sum(batches))
    stream, drawn = ProblemStream(range(size), seed), ()
    for batch in batches:
        state = stream.state()
        stream = ProblemStream(range(size), seed)
        stream.restore(state)
        drawn += stream.next_batch(batch)
    assert drawn == whole


def test_each_epoch_holds_every_item_in_its_own_order() -> None:
    stream = ProblemStream(list("abcdefghij"), seed=1)
    first, second = stream.next_batch(10), stream.next_batch(10)
    assert sorted(first) == sorted(second) == list("abcdefghij")
    assert first != second
    assert ProblemStream(list("abcdefghij"), seed=2).next_batch(10) != first


def test_generated_problems_do_not_depend_on_the_batch_size() -> None:
    source = partial(training_problem, "hard", 5)
    small, large = ProblemStream(source, 0), ProblemStream(source, 0)
    assert small.next_batch(3) + small.next_batch(4) == large.next_batch(7)


def test_nothing_to_draw_from() -> None:
    with pytest.raises(ValueError, match="empty"):
        ShuffledEpochs([], 0)


@given(
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=5),
    seed=st.integers(),
    positions=st.lists(st.integers(0, 400), min_size=1, max_size=5),
)
def test_a_mixture_is_a_function_of_the_position(
    weights: list[float], seed: int, positions: list[int]
) -> None:
    def mixture() -> MixedOrder[tuple[int, int]]:
        return MixedOrder([partial(lambda k, n: (k, n), k) for k in range(len(weights))], weights, seed)

    order = mixture()
    whole = [order(position) for position in range(401)]
    for k, weight in enumerate(weights):
        own = [n for other, n in whole if other == k]
        assert own == list(range(len(own))), "each order goes through its own positions"
        assert abs(len(own) - 401 * weight / sum(weights)) <= 6
    fresh = mixture()
    assert [fresh(position) for position in positions] == [whole[position] for position in positions]
