"""Traces to verdicts: the answers of a whole batch against their references in one go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_parallel_r1.rewards.base import Judged
from megatron_parallel_r1.rewards.extract import extract_answer
from megatron_parallel_r1.rewards.formats import Format
from megatron_parallel_r1.rewards.settle import Verdict
from megatron_parallel_r1.rewards.verifier import Verifier
from megatron_parallel_r1.thought.tree import Tree


@dataclass(frozen=True, slots=True)
class Attempt:
    """One response to judge.

    Attributes:
        text: its main text, without blocks and summaries: an answer inside those is none.
        tree: its structure.
        references: right answers, any one of which counts.
        sampled: which tokens the policy drew, None for a mere text; see `Format.of`.
    """

    text: str
    tree: Tree
    references: tuple[str, ...]
    sampled: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        assert self.references, "an attempt needs a reference answer"


def judge(attempts: Sequence[Attempt], verifier: Verifier) -> list[Judged]:
    """Extracts, verifies and checks the format of every attempt, in order."""
    answers = [extract_answer(attempt.text) for attempt in attempts]
    pairs = [
        (answer, reference)
        for answer, attempt in zip(answers, attempts, strict=True)
        for reference in attempt.references
    ]
    verdicts = iter(verifier.check_many(pairs))
    judged = []
    for answer, attempt in zip(answers, attempts, strict=True):
        best = _best([next(verdicts) for _ in attempt.references])
        judged.append(Judged(best.correct, Format.of(attempt.tree, attempt.sampled), answer, best.reason))
    return judged


def _best(verdicts: Sequence[Verdict]) -> Verdict:
    return next((verdict for verdict in verdicts if verdict.correct), verdicts[-1])
