"""The interface of a teacher, and the journal of its answers from which a killed cold start resumes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.utils.jsonl import JsonlWriter, read_jsonl

TeacherFinish = Literal["stop", "length", "refused"]


@dataclass(frozen=True, slots=True)
class TeacherRequest:
    """One sample of one problem.

    Attributes:
        sample: the index among the samples of the problem, from 0, over all rounds.
        seed: 0 <= seed < 2**31, since not every endpoint accepts more.
    """

    problem: Problem
    sample: int
    template: str
    seed: int

    @classmethod
    def of(cls, problem: Problem, sample: int, template: str, seed: int) -> TeacherRequest:
        """Builds the request whose seed, derived from the run's `seed`, is its own."""
        return cls(problem, sample, template, int(_digest([seed, problem.id, sample]), 16) % 2**31)

    def key(self, teacher: str, prompt: str) -> str:
        """Returns the key of the answer in the journal: equal for equal requests only."""
        return _digest([teacher, prompt, self.problem.id, self.sample, self.seed])


@dataclass(frozen=True, slots=True)
class TeacherAnswer:
    """The teacher's answer.

    Attributes:
        text: the text after the teacher's own reasoning; valid Unicode.
        finish: whether the teacher ended it, a limit cut it, or the teacher refused.
    """

    text: str
    finish: TeacherFinish


class NoAnswer(Exception):
    """A request has no answer after all attempts; the message describes the last failure."""


class Teacher(Protocol):
    """Answers many concurrent requests in one event loop."""

    @property
    def name(self) -> str:
        """Everything but the request that determines an answer: model and sampling."""
        ...

    async def answer(self, request: TeacherRequest) -> TeacherAnswer:
        """Answers one request.

        Raises:
            NoAnswer: there is none now; a later run may ask again.
            UserError: there will never be one with these settings.
        """
        ...


class Journal:
    """All answers by request key; answers to requests that no longer occur are ignored."""

    def __init__(self, path: Path, writer: JsonlWriter) -> None:
        self._writer = writer
        self._answers: dict[str, TeacherAnswer] = {}
        for record in read_jsonl(path):
            try:
                self._answers[record["key"]] = TeacherAnswer(record["text"], record["finish"])
            except KeyError as error:
                raise UserError(
                    f"{path}: a record without {error}, so this is no journal of answers; choose another out"
                ) from None

    def __len__(self) -> int:
        return len(self._answers)

    def find(self, key: str) -> TeacherAnswer | None:
        return self._answers.get(key)

    def append(self, key: str, request: TeacherRequest, answer: TeacherAnswer) -> None:
        """Writes an answer at once.

        Raises:
            UserError: the disk is full.
        """
        try:
            self._writer.write(
                {
                    "key": key,
                    "problem": request.problem.id,
                    "sample": request.sample,
                    "finish": answer.finish,
                    "text": answer.text,
                }
            )
        except OSError as error:
            raise UserError(f"the journal cannot be written ({error}); make room and start again") from None
        self._answers[key] = answer


@contextmanager
def open_journal(path: Path) -> Iterator[Journal]:
    """Opens the journal exclusively for this process.

    Raises:
        UserError: another process has it open, it is malformed, or its folder cannot be created.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{path.parent}: {error.strerror or error}; choose another out") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{path.parent}: another cold start is writing here; wait for it, or choose another out"
            ) from None
        with JsonlWriter(path) as writer:
            yield Journal(path, writer)
    finally:
        os.close(lock)


def _digest(parts: list[str | int]) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=12).hexdigest()
