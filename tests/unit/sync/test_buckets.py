"""Which parameters share a bucket."""

from megatron_parallel_r1.architecture.weight_table import WeightMapping
from megatron_parallel_r1.sync.buckets import plan_buckets


def owned(*pairs: tuple[int, int]) -> list[tuple[int, WeightMapping]]:
    """Parameters of so many numbers, each with its pipeline process."""
    return [(owner, WeightMapping(f"w{i}", ((f"w{i}", (size,)),))) for i, (owner, size) in enumerate(pairs)]


def names(pairs: list[tuple[int, WeightMapping]], bucket_bytes: int) -> list[tuple[int, str]]:
    buckets = plan_buckets(pairs, 2, bucket_bytes)
    return [(bucket.owner, " ".join(weight.name for weight in bucket.weights)) for bucket in buckets]


def test_neighbours_fill_a_bucket() -> None:
    assert names(owned((0, 10), (0, 10), (0, 10), (0, 1)), 40) == [(0, "w0 w1"), (0, "w2 w3")]


def test_a_larger_parameter_is_alone() -> None:
    assert names(owned((0, 1), (0, 99), (0, 1)), 40) == [(0, "w0"), (0, "w1"), (0, "w2")]


def test_stages_do_not_share_one_and_come_in_turn() -> None:
    interleaved = owned((0, 1), (1, 1), (0, 1), (1, 1), (0, 1))
    assert names(interleaved, 1000) == [(0, "w0 w2 w4"), (1, "w1 w3")]


def test_the_parts_of_a_parameter_count_together() -> None:
    fused = WeightMapping("qkv", (("q", (10,)), ("k", (5,)), ("v", (5,))))
    assert names([(0, fused), *owned((0, 1))], 41) == [(0, "qkv"), (0, "w0")]
    assert names([(0, fused), *owned((0, 1))], 42) == [(0, "qkv w0")]
