"""What the probe passes, and the cause that it names."""

import math

import pytest

from megatron_parallel_r1.sync.probe import ServerScores, TrainerScores, difference, failure, is_stale, passes

OLD, NEW, MIXED = [(-1.0, -2.0)], [(-1.5, -2.5)], [(-1.2, -2.2)]


def answers(scores, before=None, dtype: str | None = "float32") -> ServerScores:
    return ServerScores("http://a:1", scores, before, dtype)


def trained(before=None, old_head=None) -> TrainerScores:
    return TrainerScores(NEW, before, old_head, "float32")


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
