"""What the probe passes, and the cause that it names."""

import math

import pytest

from megatron_parallel_r1.sync.probe import (
    ServerScores,
    TrainerScores,
    difference,
    failure,
    is_stale,
    limits,
    passes,
)
from megatron_parallel_r1.utils.rounding import RoundingLimits

OLD, NEW, MIXED = [(-1.0, -2.0)], [(-1.5, -2.5)], [(-1.2, -2.2)]


def answers(scores, before=None, dtype: str | None = "float32") -> ServerScores:
    return ServerScores("http://a:1", scores, before, dtype)


def trained(before=None, old_head=None) -> TrainerScores:
    return TrainerScores(NEW, before, old_head, "float32", 2)


def warning_of(one: ServerScores, other: TrainerScores) -> str:
    assert not passes(one, other, 2e-5)
    return str(failure(one, other, 2e-5, version=8))


def test_the_difference_is_the_largest_and_infinite_without_numbers() -> None:
    assert difference([(-1.0, -2.0), (-3.0,)], [(-1.0, -2.5), (-3.1,)]) == 0.5
    assert difference([(math.nan,)], [(-1.0,)]) == math.inf
    assert difference([(-1.0,)], [(-1.0, -2.0)]) == math.inf


def test_equal_log_probs_pass() -> None:
    assert passes(answers(NEW, OLD), trained(OLD), 2e-5)


def test_the_message_names_server_version_difference_and_tolerance() -> None:
    text = warning_of(answers(MIXED), trained())
    assert text.startswith("http://a:1: after the sync to version 8 its log-probs differ")
    assert "0.3 nats (sync.tolerance 2e-05)" in text


@pytest.mark.parametrize(
    ("one", "other", "cause"),
    [
        (answers(OLD, OLD), trained(OLD), "stale weights"),
        (answers(OLD), trained(OLD), "stale weights"),
        (answers(MIXED, OLD), trained(OLD, MIXED), "kept the old one; send lm_head.weight"),
        (answers(MIXED, OLD, "bfloat16"), trained(OLD), "computes in bfloat16 and the trainer in float32"),
        (answers(MIXED, OLD), trained(OLD, OLD), "neither the previous version"),
    ],
)
def test_the_cause_is_named(one: ServerScores, other: TrainerScores, cause: str) -> None:
    assert cause in warning_of(one, other)


def test_stale_weights_do_not_pass_within_a_wide_tolerance() -> None:
    """In bfloat16 one step's change is within what rounding alone does."""
    stale = answers(OLD, OLD)
    assert (
        difference(OLD, NEW) < 1.0 and is_stale(stale, trained(OLD)) and not passes(stale, trained(OLD), 1.0)
    )


def test_weights_that_did_not_change_are_not_stale() -> None:
    assert passes(answers(NEW, NEW), trained(NEW), 2e-5)


def deep(dtype: str, layers: int = 36) -> TrainerScores:
    return TrainerScores([(-20.0, -30.0, -47.0)], [(-21.0, -30.0, -47.0)], None, dtype, layers)


def at(dtype: str | None, *apart: float, of: TrainerScores) -> ServerScores:
    scores = tuple(score + by for score, by in zip(of.scores[0], apart, strict=True))
    return ServerScores("http://a:1", [scores], None, dtype)


def test_the_tolerance_follows_from_dtype_depth_and_log_probs() -> None:
    """Differences that sound models had, and such that a wrong weight makes."""
    one = deep("float32")
    assert passes(at("float32", 3e-5, 4.4e-5, 0, of=one), one, None)
    assert not passes(at("float32", 1e-3, 0, 0, of=one), one, None)
    shallow = TrainerScores(NEW, OLD, None, "float32", 2)
    assert limits(answers(NEW), shallow, None) == RoundingLimits(2e-5, 2e-5)
    tiny = TrainerScores([(-5.0, -4.0)] * 5, None, None, "bfloat16", 2)
    rounded = [(-5.053, -4.001), *tiny.scores[1:]]
    assert passes(ServerScores("http://a:1", rounded, None, "bfloat16"), tiny, None)
    # As large at most, but everywhere: no rounding does that.
    assert not passes(ServerScores("http://a:1", [(-5.053, -4.053)] * 5, None, "bfloat16"), tiny, None)


def test_the_coarser_dtype_counts_and_the_message_names_it() -> None:
    one = deep("float32")
    assert passes(at("bfloat16", 0.2, 0.3, 0.1, of=one), one, None)
    coarse = str(failure(at("bfloat16", 9.0, 0, 0, of=one), one, None, version=3))
    assert "up to 9 nats (rounding in bfloat16 and float32 explains" in coarse
    assert "it computes in bfloat16 and the trainer in float32; start it with --dtype float32" in coarse
    assert "remove sync.tolerance" not in coarse
    both = deep("bfloat16")
    by_hand = str(failure(at("bfloat16", 0.2, 0, 0, of=both), both, 2e-5, version=3))
    assert "rounding in bfloat16 explains that in a model of 36 layers; remove sync.tolerance" in by_hand
    silent = str(failure(at(None, 0.2, 0, 0, of=one), one, None, version=3))
    assert "with --dtype float32" in silent


def test_scores_without_numbers_never_pass() -> None:
    broken = TrainerScores([(-math.inf, -1.0)], None, None, "bfloat16", 2)
    assert not passes(ServerScores("http://a:1", broken.scores, None, "bfloat16"), broken, None)


def test_stale_weights_show_without_the_answers_before_the_update() -> None:
    """A server's rounding is far smaller than what the update changed, both within what bfloat16 explains."""
    one = TrainerScores([(-20.0, -30.0)], [(-20.3, -30.2)], None, "bfloat16", 36)
    stale = ServerScores("http://a:1", [(-20.28, -30.21)], None, "bfloat16")
    assert difference(stale.scores, one.scores) < limits(stale, one, None).mean
    assert is_stale(stale, one) and not passes(stale, one, None)
    assert passes(ServerScores("http://a:1", [(-20.02, -29.97)], None, "bfloat16"), one, None)
