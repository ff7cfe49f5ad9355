"""Verifies that a server computes with the trainer's weights: the same tokens have the same log-probs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.sync.control import RowScores, TokenRow

# The trainer's log-probs of rows, as `ServerControl.score` returns a server's. All ranks call it; the result
# on rank 0 counts. A head replaces the model's.
ProbeScorer = Callable[[Sequence[TokenRow], "OutputHead | None"], Sequence[RowScores]]

# Changed weights move some log-prob by more than its last digits; float32 resolves about 1e-6 at 10.
MOVED = 1e-5


@dataclass(frozen=True, slots=True)
class OutputHead:
    """This rank's rows of an output matrix that replaces the model's own; None if it has none."""

    rows_VE: Tensor | None


@dataclass(frozen=True, slots=True)
class ServerScores:
    """A server's log-probs of the probe's rows, now and after the previous update, and its dtype if known."""

    url: str
    scores: Sequence[RowScores]
    before: Sequence[RowScores] | None
    dtype: str | None


@dataclass(frozen=True, slots=True)
class TrainerScores:
    """The trainer's log-probs of the same rows.

    Attributes:
        before: under the previous version's weights, if there was one.
        old_head: under its weights with the previous version's output matrix; None: not computed.
    """

    scores: Sequence[RowScores]
    before: Sequence[RowScores] | None
    old_head: Sequence[RowScores] | None
    dtype: str


def difference(actual: Sequence[RowScores], expected: Sequence[RowScores]) -> float:
    """The largest difference in nats; infinite if one is NaN or the lengths differ."""
    if [len(row) for row in actual] != [len(row) for row in expected]:
        return math.inf
    differences = [
        abs(a - b)
        for actual_row, expected_row in zip(actual, expected, strict=True)
        for a, b in zip(actual_row, expected_row, strict=True)
    ]
    return max((math.inf if math.isnan(value) else value for value in differences), default=0.0)


def is_stale(answers: ServerScores, trained: TrainerScores) -> bool:
    """Whether the server's scores are bit-identical to those before the update, and the trainer's are not."""
    if answers.before is None or trained.before is None:
        return False
    return (
        difference(answers.scores, answers.before) == 0 and difference(trained.scores, trained.before) > MOVED
    )


def passes(answers: ServerScores, trained: TrainerScores, tolerance: float) -> bool:
    return difference(answers.scores, trained.scores) <= tolerance and not is_stale(answers, trained)


def failure(answers: ServerScores, trained: TrainerScores, tolerance: float, version: int) -> UserError:
    """The error of a server that does not pass."""
    largest = difference(answers.scores, trained.scores)
    return UserError(
        f"{answers.url}: after the sync to version {version} its log-probs differ from the trainer's by "
        f"up to {largest:.3g} nats (sync.tolerance {tolerance:g}): {_cause(answers, trained, tolerance)}"
    )


def _cause(answers: ServerScores, trained: TrainerScores, tolerance: float) -> str:
    if is_stale(answers, trained) or _fits(answers.scores, trained.before, tolerance):
        return (
            "it still computes with the previous version's weights (stale weights); restart it, or set "
            "another sync.transport"
        )
    if _fits(answers.scores, trained.old_head, tolerance):
        return (
            "all its weights are new except the output matrix: it ties lm_head to the embedding and kept "
            "the old one; send lm_head.weight too"
        )
    if answers.dtype is not None and answers.dtype != trained.dtype:
        return (
            f"it computes in {answers.dtype} and the trainer in {trained.dtype}; start it with --dtype "
            f"{trained.dtype}, or raise sync.tolerance"
        )
    return (
        "neither the previous version nor its output matrix explains it; check that the server was started "
        "with this model's config.json and without quantization"
    )


def _fits(actual: Sequence[RowScores], expected: Sequence[RowScores] | None, tolerance: float) -> bool:
    return expected is not None and difference(actual, expected) <= tolerance
