"""Proves that a server computes with the trainer's weights: the same tokens have the same log-probs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.sync.control import RowScores, TokenRow

# The trainer's log-probs of rows, as `Control.score` gives a server's. All processes call it together, and
# what it gives on the first one counts. A head, if there is one, takes the place of the model's.
ProbeScorer = Callable[[Sequence[TokenRow], "OutputHead | None"], Sequence[RowScores]]

# Weights that changed move some log-prob by more than its last digits; float32 has about 1e-6 at 10.
MOVED = 1e-5


@dataclass(frozen=True, slots=True)
class OutputHead:
    """An output matrix to compute with instead of the model's own.

    Attributes:
        rows_VE: those of this process; None where it has none.
    """

    rows_VE: Tensor | None


@dataclass(frozen=True, slots=True)
class ServerScores:
    """A server's log-probs of the probe's rows.

    Attributes:
        url: the server.
        scores: now.
        before: those that it gave after the update before; None: there was none.
        dtype: of its weights, if it says so.
    """

    url: str
    scores: Sequence[RowScores]
    before: Sequence[RowScores] | None
    dtype: str | None


@dataclass(frozen=True, slots=True)
class TrainerScores:
    """The trainer's log-probs of the same rows.

    Attributes:
        scores: under its weights.
        before: under those of the version before, if there was one.
        old_head: under its weights but the output matrix of the version before; None: not asked.
        dtype: of its weights.
    """

    scores: Sequence[RowScores]
    before: Sequence[RowScores] | None
    old_head: Sequence[RowScores] | None
    dtype: str


def difference(found: Sequence[RowScores], wanted: Sequence[RowScores]) -> float:
    """The largest in nats; infinite where one is no number or they are not of one length."""
    if [len(row) for row in found] != [len(row) for row in wanted]:
        return math.inf
    apart = [
        abs(a - b) for one, other in zip(found, wanted, strict=True) for a, b in zip(one, other, strict=True)
    ]
    return max((math.inf if math.isnan(one) else one for one in apart), default=0.0)


def is_stale(answers: ServerScores, trained: TrainerScores) -> bool:
    """Whether the server answers to the bit as before the update, and the trainer does not."""
    if answers.before is None or trained.before is None:
        return False
    return (
        difference(answers.scores, answers.before) == 0 and difference(trained.scores, trained.before) > MOVED
    )


def passes(answers: ServerScores, trained: TrainerScores, tolerance: float) -> bool:
    return difference(answers.scores, trained.scores) <= tolerance and not is_stale(answers, trained)


def failure(answers: ServerScores, trained: TrainerScores, tolerance: float, version: int) -> UserError:
    """What to say of a server that does not pass."""
    apart = difference(answers.scores, trained.scores)
    return UserError(
        f"{answers.url}: after the sync to version {version} its log-probs differ from the trainer's by "
        f"up to {apart:.3g} nats (sync.tolerance {tolerance:g}): {_cause(answers, trained, tolerance)}"
    )


def _cause(answers: ServerScores, trained: TrainerScores, tolerance: float) -> str:
    if is_stale(answers, trained) or _fits(answers.scores, trained.before, tolerance):
        return (
            "it still computes with the weights of the version before (stale weights); start it anew, or set "
            "sync.transport to another one"
        )
    if _fits(answers.scores, trained.old_head, tolerance):
        return (
            "all but its output matrix is new: it ties lm_head to the embedding and kept the old one; send "
            "lm_head.weight too"
        )
    if answers.dtype is not None and answers.dtype != trained.dtype:
        return (
            f"it computes in {answers.dtype} and the trainer in {trained.dtype}; start it with --dtype "
            f"{trained.dtype}, or raise sync.tolerance"
        )
    return (
        "neither the version before nor its output matrix explains it; see that the server was started with "
        "this model's config.json and without quantization"
    )


def _fits(found: Sequence[RowScores], wanted: Sequence[RowScores] | None, tolerance: float) -> bool:
    return wanted is not None and difference(found, wanted) <= tolerance
