"""The items of a data set: problems to solve, and worked examples of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ChatTurn = tuple[str, str]
"""The role and the text of one turn of a conversation."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A question with a verifiable answer.

    Attributes:
        id: unique within the source and stable between runs.
        prompt: the bare question, before any prompt template.
        answers: right final answers, any of which counts; several where a question has several solutions.
            Not empty, none blank.
        source: the data set.
        context: messages before the question, such as a system prompt.
        columns: all columns of its row, for rewards and prompt templates; no part of its identity.
    """

    id: str
    prompt: str
    answers: tuple[str, ...]
    source: str
    context: tuple[ChatTurn, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        assert self.prompt.strip(), f"problem {self.id} of {self.source} has no prompt"
        assert self.answers, f"problem {self.id} of {self.source} has no answer"
        assert all(answer.strip() for answer in self.answers), f"blank answer in {self.id}"

    @property
    def answer(self) -> str:
        """The first right answer."""
        return self.answers[0]


@dataclass(frozen=True, slots=True)
class Example:
    """A problem with a worked response in canonical text, including tags and final answer."""

    problem: Problem
    response: str
