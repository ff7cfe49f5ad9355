"""The majority of several answers to one question (self-consistency, arXiv 2203.11171).

Equal answers vote together, equal as the rewards' verifier sees it. Who gives no answer has no vote. Of
equally frequent answers the one given first wins: samples are exchangeable, so that is a fair draw without a
seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from megatron_parallel_r1.rewards.verifier import Verifier

Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Ballot:
    """One sample's answer, None for none, and whether it is right."""

    answer: str | None
    correct: bool


def right_votes(
    problems: Sequence[Sequence[Ballot]], votes: int, verifier: Verifier
) -> tuple[tuple[int, ...], int]:
    """How many votes of each problem elect a right answer, and how many votes each problem has.

    Args:
        problems: the ballots of each, in the order of samples, equally many.
        votes: ballots that one vote counts: samples 0..votes-1, the next `votes`, and so on.
    """
    equal = _equalities(problems, verifier)
    of = len(problems[0]) // votes
    right = tuple(
        sum(_elected_right(ballots[start : start + votes], equal) for start in range(0, of * votes, votes))
        for ballots in problems
    )
    return right, of


def elect(ballots: Sequence[Ballot], equal: Mapping[Pair, bool]) -> int | None:
    """The index of the first ballot for the answer that wins; None where nobody gave an answer.

    Args:
        equal: of answers in the order in which they were first given.
    """
    tallies: dict[int, int] = {}
    for index, ballot in enumerate(ballots):
        if ballot.answer is None:
            continue
        first = next((other for other in tallies if _together(ballots[other], ballot, equal)), index)
        tallies[first] = tallies.get(first, 0) + 1
    # `max` takes the first of equals, and a dict keeps the order in which answers came up.
    return max(tallies, key=tallies.__getitem__) if tallies else None


def _elected_right(ballots: Sequence[Ballot], equal: Mapping[Pair, bool]) -> bool:
    winner = elect(ballots, equal)
    return winner is not None and ballots[winner].correct


def _together(one: Ballot, other: Ballot, equal: Mapping[Pair, bool]) -> bool:
    """A right and a wrong answer never are: the verifier told them apart by the reference."""
    if one.correct != other.correct:
        return False
    return one.answer == other.answer or equal[_ordered(one.answer or "", other.answer or "")]


def _equalities(problems: Sequence[Sequence[Ballot]], verifier: Verifier) -> dict[Pair, bool]:
    """The verdict on every pair that a vote may ask about, all in one go."""
    pairs: dict[Pair, None] = {}
    for ballots in problems:
        for side in (True, False):
            given = dict.fromkeys(b.answer for b in ballots if b.answer is not None and b.correct is side)
            pairs.update(dict.fromkeys(_ordered(one, other) for one, other in combinations(given, 2)))
    verdicts = verifier.check_many(pairs)
    return {pair: verdict.correct for pair, verdict in zip(pairs, verdicts, strict=True)}


def _ordered(one: str, other: str) -> Pair:
    return (one, other) if one <= other else (other, one)
