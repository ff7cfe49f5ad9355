"""The vote: equal answers together, ties to the first, silence without a vote."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatron_parallel_r1.evaluation.statistics import Ballot, elect, right_votes
from megatron_parallel_r1.rewards.verifier import Verifier


def ballots(*votes: tuple[str | None, bool]) -> list[Ballot]:
    return [Ballot(answer, correct) for answer, correct in votes]


RIGHT, WRONG, SILENT = (r"\frac{1}{2}", True), ("3", False), (None, False)


def test_spellings_of_one_answer_vote_together() -> None:
    with Verifier() as verifier:
        case = ballots(WRONG, ("0.5", True), WRONG, RIGHT, ("1/2", True))
        assert right_votes([case], 5, verifier) == ((1,), 1)
        assert right_votes([ballots(WRONG, ("0.5", True), WRONG, ("4", False))], 4, verifier) == ((0,), 1)


def test_two_right_answers_are_two_candidates() -> None:
    """A problem with the solutions 3 and 5: together they would beat 7, each alone does not."""
    case = ballots(("7", False), ("3", True), ("7", False), ("5", True), ("7", False), ("3", True))
    with Verifier() as verifier:
        assert right_votes([case], 6, verifier) == ((0,), 1)


def test_ties_go_to_the_answer_given_first() -> None:
    assert elect(ballots(("a", False), ("b", True)), {}) == 0
    assert elect(ballots(("b", True), ("a", False)), {}) == 0
    assert (
        elect(
            ballots(("c", False), ("b", True), ("a", False), ("a", False), ("b", True)), {("a", "c"): False}
        )
        == 1
    )


def test_who_gives_no_answer_has_no_vote() -> None:
    assert elect(ballots(SILENT, SILENT, WRONG), {}) == 2
    assert elect(ballots(SILENT, SILENT), {}) is None
    with Verifier() as verifier:
        assert right_votes([ballots(SILENT, SILENT)], 2, verifier) == ((0,), 1)


def test_votes_are_of_neighbouring_samples_and_a_rest_is_left_out() -> None:
    case = ballots(RIGHT, RIGHT, WRONG, WRONG, RIGHT)
    with Verifier() as verifier:
        assert right_votes([case], 2, verifier) == ((1,), 2)
        assert right_votes([case], 1, verifier) == ((3,), 5)


@given(st.lists(st.sampled_from(["1", "2", "3", None]), min_size=1, max_size=9))
def test_the_winner_has_most_votes(answers: list[str | None]) -> None:
    case = ballots(*((answer, answer == "1") for answer in answers))
    winner = elect(case, {("2", "3"): False})
    spoken = [answer for answer in answers if answer is not None]
    if not spoken:
        assert winner is None
    else:
        most = max(map(spoken.count, spoken))
        assert answers[winner] == next(answer for answer in spoken if spoken.count(answer) == most)
        assert winner == answers.index(answers[winner])
