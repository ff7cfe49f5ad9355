"""Majority votes over several answers to one problem (self-consistency, arXiv 2203.11171).

Answers that the rewards' verifier holds equal vote together; a response without an answer has no vote. Of
equally frequent answers the first wins: samples are exchangeable, so that is a fair draw without a seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from megatron_parallel_r1.rewards.verifier import Verifier

AnswerPair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Ballot:
    """One sample's answer, None for none, and whether it is right."""

    answer: str | None
    correct: bool


def right_votes(
    problems: Sequence[Sequence[Ballot]], votes: int, verifier: Verifier
) -> tuple[tuple[int, ...], int]:
    """The number of votes of each problem that elect a right answer, and the number of votes per problem.

    Args:
        problems: the ballots of each, in the order of samples, the same number for all.
        votes: ballots in one vote: samples 0..votes-1, the next `votes`, and so on.
    """
    equal = _equalities(problems, verifier)
    count = len(problems[0]) // votes
    right = tuple(
        sum(_elects_right(ballots[start : start + votes], equal) for start in range(0, count * votes, votes))
        for ballots in problems
    )
    return right, count


def elect(ballots: Sequence[Ballot], equal: Mapping[AnswerPair, bool]) -> int | None:
    """The index of the first ballot for the winning answer; None if no ballot has an answer.

    Args:
        equal: whether two answers are equal, by their sorted pair.
    """
    tallies: dict[int, int] = {}
    for index, ballot in enumerate(ballots):
        if ballot.answer is None:
            continue
        first = next((other for other in tallies if _same_vote(ballots[other], ballot, equal)), index)
        tallies[first] = tallies.get(first, 0) + 1
    # `max` returns the first of equals, and a dict keeps the order of insertion.
    return max(tallies, key=tallies.__getitem__) if tallies else None


def _elects_right(ballots: Sequence[Ballot], equal: Mapping[AnswerPair, bool]) -> bool:
    winner = elect(ballots, equal)
    return winner is not None and ballots[winner].correct


def _same_vote(a: Ballot, b: Ballot, equal: Mapping[AnswerPair, bool]) -> bool:
    """A right and a wrong answer are never equal: the verifier compared both with the reference."""
    if a.correct != b.correct:
        return False
    return a.answer == b.answer or equal[_sorted_pair(a.answer or "", b.answer or "")]


def _equalities(problems: Sequence[Sequence[Ballot]], verifier: Verifier) -> dict[AnswerPair, bool]:
    """The verdict on every pair of answers that may meet in a vote, in one batch."""
    pairs: dict[AnswerPair, None] = {}
    for ballots in problems:
        for side in (True, False):
            answers = dict.fromkeys(b.answer for b in ballots if b.answer is not None and b.correct is side)
            pairs.update(dict.fromkeys(_sorted_pair(a, b) for a, b in combinations(answers, 2)))
    verdicts = verifier.check_many(list(pairs))
    return {pair: verdict.correct for pair, verdict in zip(pairs, verdicts, strict=True)}


def _sorted_pair(a: str, b: str) -> AnswerPair:
    return (a, b) if a <= b else (b, a)
