"""Requests samples from the teacher, round by round, until each problem has enough traces or no rounds left.

Which sample is requested next depends only on the answers, so a run resumed from its journal makes the
requests, and reaches the result, of an uninterrupted one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from megatron_parallel_r1.coldstart.checks import Checked, Rejection, check
from megatron_parallel_r1.coldstart.settings import ColdStart
from megatron_parallel_r1.coldstart.teacher import Journal, NoAnswer, Teacher, TeacherAnswer, TeacherRequest
from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.data.prompts import render
from megatron_parallel_r1.rewards.verifier import Verifier
from megatron_parallel_r1.thought.format_settings import format_of

LOG_EVERY_S = 10.0


@dataclass(frozen=True, slots=True)
class SampleResult:
    """One request and its result.

    Attributes:
        number: the index among the samples of the problem.
        checked: the checked answer, None without an answer.
        failure: why there is no answer, else empty.
    """

    number: int
    checked: Checked | None
    failure: str = ""

    @property
    def kept(self) -> bool:
        return self.checked is not None and self.checked.kept


@dataclass(frozen=True, slots=True)
class ProblemResult:
    """All samples of one problem, in order."""

    problem: Problem
    samples: tuple[SampleResult, ...]
    rounds: int

    @property
    def kept(self) -> tuple[SampleResult, ...]:
        return tuple(sample for sample in self.samples if sample.kept)


class Rounds:
    """The rounds of requests to one teacher.

    Args:
        log: receives a line of progress from time to time.
    """

    def __init__(
        self,
        settings: ColdStart,
        teacher: Teacher,
        journal: Journal,
        verifier: Verifier,
        log: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._teacher = teacher
        self._journal = journal
        self._verifier = verifier
        self._log = log
        self._format = format_of(settings.format)
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._answered = self._passed = self._problems_done = 0
        self._next_log = time.monotonic() + LOG_EVERY_S

    async def run(self, problems: Sequence[Problem]) -> list[ProblemResult]:
        """Returns the result of each problem, in order.

        Raises:
            UserError: the teacher cannot be used with these settings. The journal holds all answers so far.
        """
        tasks = [asyncio.ensure_future(self._problem(problem)) for problem in problems]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _problem(self, problem: Problem) -> ProblemResult:
        settings = self._settings
        samples: list[SampleResult] = []
        rounds = 0
        while rounds <= settings.rounds and sum(sample.kept for sample in samples) < settings.enough:
            numbers = range(len(samples), len(samples) + settings.samples)
            answers = await asyncio.gather(*(self._answer(problem, number) for number in numbers))
            # In a thread: a formula may take a worker process seconds, and other requests go on meanwhile.
            new = await asyncio.to_thread(self._check, problem, numbers, answers)
            samples = _reject_repeats([*samples, *new])
            rounds += 1
        self._problems_done += 1
        self._passed += sum(sample.kept for sample in samples)
        return ProblemResult(problem, tuple(samples), rounds)

    async def _answer(self, problem: Problem, number: int) -> TeacherAnswer | NoAnswer:
        request = TeacherRequest.of(problem, number, self._settings.template, self._settings.seed)
        key = request.key(self._teacher.name, render(request.template, problem))
        answer = self._journal.find(key)
        if answer is not None:
            return answer
        async with self._slots:
            try:
                answer = await self._teacher.answer(request)
            except NoAnswer as failure:
                return failure
            self._journal.append(key, request, answer)
        self._answered += 1
        if time.monotonic() >= self._next_log:
            self._next_log = time.monotonic() + LOG_EVERY_S
            done = f"{self._problems_done} problems done, {self._passed} traces pass"
            self._log(f"{self._answered} answers so far, {done}")
        return answer

    def _check(
        self, problem: Problem, numbers: Sequence[int], answers: Sequence[TeacherAnswer | NoAnswer]
    ) -> list[SampleResult]:
        return [
            SampleResult(number, None, str(answer))
            if isinstance(answer, NoAnswer)
            else SampleResult(
                number, check(answer, problem, self._settings.check, self._verifier, self._format)
            )
            for number, answer in zip(numbers, answers, strict=True)
        ]


def _reject_repeats(samples: Sequence[SampleResult]) -> list[SampleResult]:
    """Rejects every kept sample whose text equals that of an earlier one."""
    texts: set[str] = set()
    checked = []
    for sample in samples:
        if sample.checked is not None and sample.kept:
            text = sample.checked.text
            if text in texts:
                sample = replace(sample, checked=replace(sample.checked, rejection=Rejection("repeated")))
            texts.add(text)
        checked.append(sample)
    return checked
