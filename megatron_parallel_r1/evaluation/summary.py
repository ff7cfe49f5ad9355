"""Figures of checkpoints on benchmarks, computed from their response records, and paired tests of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from megatron_parallel_r1.evaluation.modes import EvaluationMode
from megatron_parallel_r1.evaluation.records import ResponseRecord
from megatron_parallel_r1.evaluation.statistics import (
    Ballot,
    Comparison,
    Interval,
    ProblemScores,
    compare,
    holm,
    pass_at_k,
    right_votes,
    score_interval,
)
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


@dataclass(frozen=True, slots=True)
class BenchmarkResult:
    """The figures of one benchmark, and the headline score of each problem for paired tests."""

    summary: EvaluationSummary
    scores: ProblemScores


def summarise(
    checkpoint: str,
    step: int | None,
    benchmark: str,
    mode: EvaluationMode,
    records: Sequence[Sequence[ResponseRecord]],
    verifier: Verifier,
) -> BenchmarkResult:
    """Computes the figures.

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
    return BenchmarkResult(summary, scores)


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


@dataclass(frozen=True, slots=True)
class PairedTest:
    """`after` against `before`; `adjusted` is Holm's p-value over all pairs of the comparison."""

    before: EvaluationSummary
    after: EvaluationSummary
    comparison: Comparison
    adjusted: float


def paired_tests(results: Sequence[BenchmarkResult]) -> list[PairedTest]:
    """Compares each checkpoint with the first one in the same mode, and each mode with the first one of the
    same checkpoint, on the problems of one benchmark; results of one name and mode come in the order of
    checkpoints.
    """
    chosen: list[tuple[BenchmarkResult, BenchmarkResult]] = []
    for index, after in enumerate(results):
        earlier = results[:index]
        same_mode = [r for r in earlier if _agree(r, after, "benchmark", "mode")]
        same_model = [r for r in earlier if _agree(r, after, "benchmark", "checkpoint", "step")]
        chosen += [(group[0], after) for group in (same_mode, same_model) if group]
    tested = [(before, after, compare(before.scores, after.scores)) for before, after in chosen]
    common = [(before, after, comparison) for before, after, comparison in tested if comparison is not None]
    adjusted = holm([comparison.p for _, _, comparison in common])
    return [
        PairedTest(before.summary, after.summary, comparison, p)
        for (before, after, comparison), p in zip(common, adjusted, strict=True)
    ]


def _agree(a: BenchmarkResult, b: BenchmarkResult, *names: str) -> bool:
    return all(getattr(a.summary, name) == getattr(b.summary, name) for name in names)
