"""What a data set is made of: problems to solve, and worked examples of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """A question with a verifiable answer.

    Attributes:
        id: names the problem within its source, stable between runs.
        prompt: the bare question, before any prompt template.
        answers: right final answers, any one of which counts; more than one where a question has
            several solutions. Not empty, none blank.
        source: the data set that it comes from.
    """

    id: str
    prompt: str
    answers: tuple[str, ...]
    source: str

    def __post_init__(self) -> None:
        assert self.prompt.strip(), f"problem {self.id} of {self.source} has no prompt"
        assert self.answers, f"problem {self.id} of {self.source} has no answer"
        assert all(answer.strip() for answer in self.answers), f"blank answer in {self.id}"

    @property
    def answer(self) -> str:
        """A right answer, the first of them."""
        return self.answers[0]


@dataclass(frozen=True, slots=True)
class Example:
    """A problem with a worked response, tags and final answer included, in canonical text."""

    problem: Problem
    response: str
