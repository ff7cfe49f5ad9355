"""What a teacher is asked, what it answers, and what it is."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Literal, Protocol

from megatron_parallel_r1.data.problems import Problem

Finish = Literal["stop", "length", "refused"]


@dataclass(frozen=True, slots=True)
class Request:
    """One sample of one problem.

    Attributes:
        sample: its number among those of the problem, from 0, through all rounds.
        seed: of its draws, 0 <= seed < 2**31: not every endpoint takes more.
    """

    problem: Problem
    sample: int
    template: str
    seed: int

    @classmethod
    def of(cls, problem: Problem, sample: int, template: str, seed: int) -> Request:
        """The request whose draws are different from those of any other one of the run of seed `seed`."""
        return cls(problem, sample, template, int(_digest([seed, problem.id, sample]), 16) % 2**31)

    def key(self, teacher: str, prompt: str) -> str:
        """Equal for equal requests alone: an answer kept under it is one to this very request."""
        return _digest([teacher, prompt, self.problem.id, self.sample, self.seed])


@dataclass(frozen=True, slots=True)
class Answer:
    """What the teacher wrote.

    Attributes:
        text: without what it thought before it answered; valid Unicode.
        finish: it ended by itself, a limit cut it, or it would not answer.
    """

    text: str
    finish: Finish


class Unanswered(Exception):
    """A request has no answer after all its tries; the message says what came of the last one."""


class Teacher(Protocol):
    """Answers requests, many at once in one event loop."""

    @property
    def name(self) -> str:
        """All that decides an answer besides the request: model and sampling."""
        ...

    async def answer(self, request: Request) -> Answer:
        """The answer to one request.

        Raises:
            Unanswered: none came; it may be asked again later.
            UserError: it will never come, as things are set.
        """
        ...


def _digest(parts: list[str | int]) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=12).hexdigest()
