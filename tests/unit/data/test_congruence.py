"""The embedded task and its held-out split, by enumeration."""

from __future__ import annotations

import pytest

from megatron_parallel_r1.data.embedded.congruence import (
    MODULUS,
    Congruence,
    Difficulty,
    is_held_out,
    reduced_forms,
    vocabulary,
)
from megatron_parallel_r1.data.embedded.generate import evaluation_problems, training_problem
from megatron_parallel_r1.errors import UserError
from tests.unit.data.posed import read


def test_question_and_attempt() -> None:
    hard = Congruence("hard", 3, 5, 4, 7)
    assert hard.question == "Solve mod 13: 3x² +5x +4 =7"
    assert hard.need == 3
    assert hard.attempt(6) == ["x=6", "ax=5", "ax+b=10", "s=8", "no"]
    easy = Congruence("easy", 3, 0, 4, 7)
    assert easy.question == "Solve mod 13: 3x +4 =7"
    assert easy.attempt(1) == ["x=1", "ax=3", "ok"]
    assert easy.roots == (1,)


@pytest.mark.parametrize("kind", ["easy", "hard"])
def test_roots_solve_the_congruence_as_it_is_posed(kind: Difficulty) -> None:
    for index in range(200):
        problem = training_problem(kind, 0, index)
        posed = read(problem.prompt)
        for x in range(MODULUS):
            left = posed.a * x**2 + posed.b * x if kind == "hard" else posed.a * x
            solves = (left + posed.d - posed.c) % MODULUS == 0
            assert solves == (str(x) in problem.answers)


def test_words_are_distinct_and_only_answers_are_bare_integers() -> None:
    words = vocabulary()
    assert len(set(words)) == len(words)
    assert [word for word in words if word.isdigit()] == [str(n) for n in range(MODULUS)]


def test_hard_split_keeps_no_scaling_of_a_training_problem() -> None:
    trained = {(form.a, form.b, form.need) for form in reduced_forms("hard", held_out=False)}
    held = {(form.a, form.b, form.need) for form in reduced_forms("hard", held_out=True)}
    assert (len(trained), len(held)) == (540, 552)
    for k in range(1, MODULUS):
        assert not {tuple(k * n % MODULUS for n in form) for form in held} & trained


def test_easy_split() -> None:
    trained = {(form.a, form.need) for form in reduced_forms("easy", held_out=False)}
    held = {(form.a, form.need) for form in reduced_forms("easy", held_out=True)}
    assert (len(trained), len(held)) == (117, 39)
    assert not trained & held


@pytest.mark.parametrize(("kind", "distinct", "most"), [("easy", 39, 507), ("hard", 552, 7176)])
def test_evaluation_problems(kind: Difficulty, distinct: int, most: int) -> None:
    problems = evaluation_problems(kind, most)
    assert len({problem.prompt for problem in problems}) == most
    assert problems[:100] == evaluation_problems(kind, 100)
    posed = [read(problem.prompt) for problem in problems]
    assert all(is_held_out(congruence) for congruence in posed)
    assert len({(c.a, c.b, c.need) for c in posed[:distinct]}) == distinct
    with pytest.raises(UserError, match=f"{most + 1} problems wanted, {most} are held out"):
        evaluation_problems(kind, most + 1)


@pytest.mark.parametrize("kind", ["easy", "hard"])
def test_training_problems_are_never_held_out(kind: Difficulty) -> None:
    problems = [training_problem(kind, 3, index) for index in range(500)]
    assert not any(is_held_out(read(problem.prompt)) for problem in problems)
    assert problems == [training_problem(kind, 3, index) for index in range(500)]
    assert problems != [training_problem(kind, 4, index) for index in range(500)]
