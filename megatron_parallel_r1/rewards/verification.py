"""Traces to verdicts: the answers of a whole batch against their references in one go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_parallel_r1.rewards.base import Judged
from megatron_parallel_r1.rewards.extract import extract_answer
from megatron_parallel_r1.rewards.fast_equality import Verdict
from megatron_parallel_r1.rewards.formats import Format
from megatron_parallel_r1.rewards.path_diversity import trace_difference
from megatron_parallel_r1.rewards.verifier import Verifier
from megatron_parallel_r1.thought.layout import critical_length
from megatron_parallel_r1.thought.tree import Tree


@dataclass(frozen=True, slots=True)
class Attempt:
    """One response to judge.

    Attributes:
        text: its main text, without blocks and summaries: an answer inside those is none.
        tree: its structure.
        references: right answers, any one of which counts.
        sampled: which tokens the policy drew, None for a mere text; see `Format.of`.
        tokens: the whole trace, None where paths need not be compared.
    """

    text: str
    tree: Tree
    references: tuple[str, ...]
    sampled: tuple[bool, ...] | None = None
    tokens: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        assert self.references, "an attempt needs a reference answer"
        assert self.tokens is None or len(self.tokens) == self.tree.length, "tokens and tree are one trace"


def judge(attempts: Sequence[Attempt], verifier: Verifier) -> list[Judged]:
    """Extracts, verifies and checks the format of every attempt, in order."""
    answers = [extract_answer(attempt.text) for attempt in attempts]
    pairs = [
        (answer, reference)
        for answer, attempt in zip(answers, attempts, strict=True)
        for reference in attempt.references
    ]
    verdicts = iter(verifier.check_many(pairs))
    return [
        _judged(attempt, answer, _best([next(verdicts) for _ in attempt.references]))
        for answer, attempt in zip(answers, attempts, strict=True)
    ]


def _judged(attempt: Attempt, answer: str | None, verdict: Verdict) -> Judged:
    return Judged(
        correct=verdict.correct,
        format=Format.of(attempt.tree, attempt.sampled),
        extracted=answer,
        reason=verdict.reason,
        text=attempt.text,
        references=attempt.references,
        length=attempt.tree.length,
        critical_length=critical_length(attempt.tree),
        difference=None if attempt.tokens is None else trace_difference(attempt.tokens, attempt.tree),
    )


def _best(verdicts: Sequence[Verdict]) -> Verdict:
    return next((verdict for verdict in verdicts if verdict.correct), verdicts[-1])
