"""Seeds are a promise: the same recipe draws the same numbers in every version."""

from __future__ import annotations

from megatron_parallel_r1.utils.seeding import derive_seed, hash_seed, seed_series


def test_seeds_of_a_purpose_stay_what_they_are() -> None:
    assert derive_seed(7, "evaluation") == 3367890406
    assert derive_seed(7, "rl", "rollout") == 3512757224


def test_a_longer_series_begins_with_the_shorter_one() -> None:
    series = seed_series(4, 7, 3)
    assert series == [2530781778362038830, 4716745245403041770, 6655347892984460129, 564825809636691806]
    assert seed_series(2, 7, 3) == series[:2]


def test_hashed_seeds_stay_what_they_are() -> None:
    assert hash_seed("7 0") == 6967742470526479194
    assert hash_seed(repr((7, ()))) == 2057755848320120648
    assert hash_seed(repr((7, ((1, 2),)))) == 6524103871285346738
