"""Figures of one checkpoint on one benchmark, computed from its response records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from megatron_parallel_r1.evaluation.modes import EvaluationMode
from megatron_parallel_r1.evaluation.records import ResponseRecord
from megatron_parallel_r1.evaluation.statistics import Interval, ProblemScores, pass_at_k, score_interval
from megatron_parallel_r1.evaluation.votes import Ballot, right_votes
from megatron_parallel_r1.rewards.verifier import Verifier


@dataclass(frozen=True, slots=True)
class RightShare:
    """Number of right responses among `of`; `value` is None where there are none."""

    right: int
    of: int

    @property
    def value(self) -> float | None:
        return self.right / self.of if self.of else None


@dataclass(frozen=True, slots=True)
class EvaluationSummary:
    """One checkpoint on one benchmark in one mode.

    Attributes:
        step: training steps of the checkpoint, None where unknown.
        score: the headline: mean@S, in majority@k the share of right votes.
        passes: pass@k by k: 1, 2, 4, … and S.
        votes, majority: k and maj@k; k is S except in mode majority@k.
        parallel_ratio: share of responses with a block.
        well_formed: share of blocks that the policy closed in good form.
        tokens, critical_tokens: mean of a response, and of its longest chain.
        saved: share of all tokens that are not on the critical path.
        first_block: mean relative position of the first block, 0..1; `first_block_token` its mean index.
        with_blocks, without_blocks: right responses among those that use blocks, and among the others.
        truncated, unanswered: shares of responses cut by a limit, and without a final answer.
    """

    checkpoint: str
    step: int | None
    benchmark: str
    mode: str
    problems: int
    samples: int
    score: Interval
    mean: Interval
    passes: dict[int, Interval]
    votes: int
    majority: Interval
    parallel_ratio: float
    blocks_per_response: float
    well_formed: float | None
    paths_per_block: float | None
    tokens: float
    critical_tokens: float
    saved: float
    first_block: float | None
    first_block_token: float | None
    with_blocks: RightShare
    without_blocks: RightShare
    truncated: float
    unanswered: float

    def record(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def summarise(
    checkpoint: str,
    step: int | None,
    benchmark: str,
    mode: EvaluationMode,
    records: Sequence[Sequence[ResponseRecord]],
    verifier: Verifier,
) -> tuple[EvaluationSummary, ProblemScores]:
    """Figures, and the headline score of each problem for paired tests.

    Args:
        records: [P][S], the samples of each problem in order, the same number for all.
    """
    count = len(records[0])
    problems = tuple(samples[0].identity for samples in records)
    mean = ProblemScores(problems, tuple(sum(r.correct for r in samples) for samples in records), count)
    ballots = [[Ballot(r.answer, r.correct) for r in samples] for samples in records]
    votes = mode.votes if mode.kind == "majority" else count
    majority = ProblemScores(problems, *right_votes(ballots, votes, verifier))
    scores = majority if mode.kind == "majority" else mean
    flat = [record for samples in records for record in samples]
    blocks = sum(record.blocks for record in flat)
    tokens = sum(record.tokens for record in flat)
    critical = sum(record.critical_tokens for record in flat)
    summary = EvaluationSummary(
        checkpoint=checkpoint,
        step=step,
        benchmark=benchmark,
        mode=str(mode),
        problems=len(records),
        samples=count,
        score=scores.interval,
        mean=mean.interval,
        passes={k: _pass_interval(mean, k) for k in _ks(count)},
        votes=votes,
        majority=majority.interval,
        parallel_ratio=fmean(record.blocks > 0 for record in flat),
        blocks_per_response=blocks / len(flat),
        well_formed=sum(record.well_formed_blocks for record in flat) / blocks if blocks else None,
        paths_per_block=sum(record.paths for record in flat) / blocks if blocks else None,
        tokens=tokens / len(flat),
        critical_tokens=critical / len(flat),
        saved=1 - critical / tokens,
        first_block=_mean([r.first_block for r in flat if r.first_block is not None]),
        first_block_token=_mean([r.first_block_token for r in flat if r.first_block_token is not None]),
        with_blocks=_share([record for record in flat if record.blocks]),
        without_blocks=_share([record for record in flat if not record.blocks]),
        truncated=fmean(record.finish == "length" for record in flat),
        unanswered=fmean(record.answer is None for record in flat),
    )
    return summary, scores


def in_order(
    records: Mapping[str, ResponseRecord], keys: Sequence[str], samples: int
) -> list[list[ResponseRecord]]:
    """The records of `keys`, grouped by `samples` to a problem."""
    flat = [records[key] for key in keys]
    return [flat[start : start + samples] for start in range(0, len(flat), samples)]


def _pass_interval(scores: ProblemScores, k: int) -> Interval:
    passes_P = [pass_at_k(scores.of, right, k) for right in scores.right_P]
    return score_interval(passes_P, scores.of // k)


def _ks(samples: int) -> list[int]:
    return sorted({*(2**power for power in range(samples.bit_length())), samples})


def _share(records: Sequence[ResponseRecord]) -> RightShare:
    return RightShare(sum(record.correct for record in records), len(records))


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
