"""Verifies that a server computes with the trainer's weights: the same tokens have the same log-probs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.sync.control import RowScores, TokenRow
from megatron_parallel_r1.utils.rounding import RoundingLimits, rounding_limits

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
        layers: of the whole model.
    """

    scores: Sequence[RowScores]
    before: Sequence[RowScores] | None
    old_head: Sequence[RowScores] | None
    dtype: str
    layers: int


def difference(actual: Sequence[RowScores], expected: Sequence[RowScores]) -> float:
    """The largest difference in nats; infinite if one is NaN or the lengths differ."""
    return max(_differences(actual, expected), default=0.0)


def mean_difference(actual: Sequence[RowScores], expected: Sequence[RowScores]) -> float:
    """The mean difference in nats; infinite as `difference` is."""
    differences = _differences(actual, expected)
    return sum(differences) / max(1, len(differences))


def _differences(actual: Sequence[RowScores], expected: Sequence[RowScores]) -> list[float]:
    if [len(row) for row in actual] != [len(row) for row in expected]:
        return [math.inf]
    differences = [
        abs(a - b)
        for actual_row, expected_row in zip(actual, expected, strict=True)
        for a, b in zip(actual_row, expected_row, strict=True)
    ]
    return [math.inf if math.isnan(value) else value for value in differences]


def limits(answers: ServerScores, trained: TrainerScores, tolerance: float | None) -> RoundingLimits:
    """Most that the server's log-probs may differ from the trainer's; None: what rounding explains."""
    if tolerance is not None:
        return RoundingLimits(tolerance, tolerance)
    sizes = (abs(score) for row in trained.scores for score in row if math.isfinite(score))
    return rounding_limits((answers.dtype, trained.dtype), trained.layers, max(sizes, default=0.0))


def is_stale(answers: ServerScores, trained: TrainerScores) -> bool:
    """Whether the server's scores are those of the previous version, while the trainer's moved.

    They are bit-identical to those before the update, or nearer by half to the trainer's of that version.
    """
    if trained.before is None or difference(trained.scores, trained.before) <= MOVED:
        return False
    if answers.before is not None and difference(answers.scores, answers.before) == 0:
        return True
    apart = mean_difference(answers.scores, trained.scores)
    return mean_difference(answers.scores, trained.before) < apart / 2


def passes(answers: ServerScores, trained: TrainerScores, tolerance: float | None) -> bool:
    within = _fits(answers.scores, trained.scores, limits(answers, trained, tolerance))
    return within and not is_stale(answers, trained)


def failure(
    answers: ServerScores, trained: TrainerScores, tolerance: float | None, version: int
) -> UserError:
    """The error of a server that does not pass."""
    largest, mean = (measure(answers.scores, trained.scores) for measure in (difference, mean_difference))
    most = limits(answers, trained, tolerance)
    allowed = f"sync.tolerance {most.largest:g}"
    if tolerance is None:
        dtypes = " and ".join(sorted({trained.dtype, answers.dtype or trained.dtype}))
        allowed = f"rounding in {dtypes} explains {most.largest:.2g}, and {most.mean:.2g} on average"
    return UserError(
        f"{answers.url}: after the sync to version {version} its log-probs differ from the trainer's by "
        f"up to {largest:.3g} nats ({allowed}), by {mean:.3g} on average: {_cause(answers, trained, most)}"
    )


def _cause(answers: ServerScores, trained: TrainerScores, most: RoundingLimits) -> str:
    if is_stale(answers, trained) or _fits(answers.scores, trained.before, most):
        return (
            "it still computes with the previous version's weights (stale weights); restart it, or set "
            "another sync.transport"
        )
    if _fits(answers.scores, trained.old_head, most):
        return (
            "all its weights are new except the output matrix: it ties lm_head to the embedding and kept "
            "the old one; send lm_head.weight too"
        )
    explained = _fits(answers.scores, trained.scores, limits(answers, trained, None))
    if answers.dtype is not None and answers.dtype != trained.dtype:
        return (
            f"it computes in {answers.dtype} and the trainer in {trained.dtype}; start it with --dtype "
            f"{trained.dtype}" + (", or remove sync.tolerance" if explained else "")
        )
    if explained:
        return (
            f"rounding in {trained.dtype} explains that in a model of {trained.layers} layers; remove "
            "sync.tolerance, and the limit follows from dtype, depth and log-probs"
        )
    dtype = "" if answers.dtype else f", with --dtype {trained.dtype}"
    return (
        "neither the previous version nor its output matrix explains it; check that the server was started "
        f"with this model's config.json{dtype} and without quantization"
    )


def _fits(actual: Sequence[RowScores], expected: Sequence[RowScores] | None, most: RoundingLimits) -> bool:
    return (
        expected is not None
        and difference(actual, expected) <= most.largest
        and mean_difference(actual, expected) <= most.mean
    )
