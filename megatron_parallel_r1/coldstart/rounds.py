"""Asks the teacher, round by round, until a problem has traces enough or its rounds are over.

What is asked next depends on the answers alone, so a run that goes on from its journal asks what it would
have asked, and ends with what it would have ended with.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from megatron_parallel_r1.coldstart.checks import Checked, Rejection, check
from megatron_parallel_r1.coldstart.journal import Journal
from megatron_parallel_r1.coldstart.settings import ColdStart
from megatron_parallel_r1.coldstart.teacher import Answer, Request, Teacher, Unanswered
from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.data.prompts import render
from megatron_parallel_r1.rewards.verifier import Verifier

TELL_EVERY_S = 10.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One request and what came of it.

    Attributes:
        number: among those of its problem.
        checked: None: it stayed without an answer.
        unanswered: why, else empty.
    """

    number: int
    checked: Checked | None
    unanswered: str = ""

    @property
    def kept(self) -> bool:
        return self.checked is not None and self.checked.kept


@dataclass(frozen=True, slots=True)
class Asked:
    """All that was asked about one problem, in order."""

    problem: Problem
    samples: tuple[Sample, ...]
    rounds: int

    @property
    def kept(self) -> tuple[Sample, ...]:
        return tuple(sample for sample in self.samples if sample.kept)


class Rounds:
    """The questioning of one teacher.

    Args:
        tell: is given a line on how it goes, now and then.
    """

    def __init__(
        self,
        told: ColdStart,
        teacher: Teacher,
        journal: Journal,
        verifier: Verifier,
        tell: Callable[[str], None],
    ) -> None:
        self._told = told
        self._teacher = teacher
        self._journal = journal
        self._verifier = verifier
        self._tell = tell
        self._slots = asyncio.Semaphore(told.concurrency)
        self._answered = self._passed = self._problems_done = 0
        self._next_word = time.monotonic() + TELL_EVERY_S

    async def ask(self, problems: Sequence[Problem]) -> list[Asked]:
        """Of each problem, in their order.

        Raises:
            UserError: the teacher cannot be asked as things are set. What was answered is in the journal.
        """
        running = [asyncio.ensure_future(self._problem(problem)) for problem in problems]
        try:
            return list(await asyncio.gather(*running))
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _problem(self, problem: Problem) -> Asked:
        told = self._told
        samples: list[Sample] = []
        rounds = 0
        while rounds <= told.rounds and sum(sample.kept for sample in samples) < told.enough:
            numbers = range(len(samples), len(samples) + told.samples)
            answers = await asyncio.gather(*(self._answer(problem, number) for number in numbers))
            # A formula may take a worker process seconds; the requests go on meanwhile.
            fresh = await asyncio.to_thread(self._checked, problem, numbers, answers)
            samples = _without_repeats([*samples, *fresh])
            rounds += 1
        self._problems_done += 1
        self._passed += sum(sample.kept for sample in samples)
        return Asked(problem, tuple(samples), rounds)

    async def _answer(self, problem: Problem, number: int) -> Answer | Unanswered:
        request = Request.of(problem, number, self._told.template, self._told.seed)
        key = request.key(self._teacher.name, render(request.template, problem.prompt))
        answer = self._journal.find(key)
        if answer is not None:
            return answer
        async with self._slots:
            try:
                answer = await self._teacher.answer(request)
            except Unanswered as failure:
                return failure
            self._journal.keep(key, request, answer)
        self._answered += 1
        if time.monotonic() >= self._next_word:
            self._next_word = time.monotonic() + TELL_EVERY_S
            done = f"{self._problems_done} problems done, {self._passed} traces pass"
            self._tell(f"{self._answered} answers so far, {done}")
        return answer

    def _checked(
        self, problem: Problem, numbers: Sequence[int], answers: Sequence[Answer | Unanswered]
    ) -> list[Sample]:
        return [
            Sample(number, None, str(answer))
            if isinstance(answer, Unanswered)
            else Sample(number, check(answer, problem, self._told.check, self._verifier))
            for number, answer in zip(numbers, answers, strict=True)
        ]


def _without_repeats(samples: Sequence[Sample]) -> list[Sample]:
    """The same, but of kept samples with equal text the later ones are rejected."""
    seen: set[str] = set()
    marked = []
    for sample in samples:
        if sample.checked is not None and sample.kept:
            if sample.checked.text in seen:
                sample = replace(sample, checked=replace(sample.checked, rejection=Rejection("repeated")))
            seen.add(sample.checked.text)
        marked.append(sample)
    return marked
