"""One cold start, from the data set to the files that it leaves.

<out>/answers.jsonl    every answer as it came: a run that is started again goes on from here
      traces.parquet   what passes, balanced, in the shape of Parallel-GSM8K
      report.md, report.json
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from megatron_parallel_r1.coldstart.balance import Candidate, balance
from megatron_parallel_r1.coldstart.endpoint import open_endpoint
from megatron_parallel_r1.coldstart.journal import Journal, open_journal
from megatron_parallel_r1.coldstart.report import Outcome, Seen, Shapes, Tally
from megatron_parallel_r1.coldstart.rounds import Asked, Rounds
from megatron_parallel_r1.coldstart.settings import ColdStart, OwnEngine
from megatron_parallel_r1.coldstart.teacher import Teacher
from megatron_parallel_r1.coldstart.writing import Row, write_text, write_traces
from megatron_parallel_r1.data.account import account_table
from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.data.readers import read_problems
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rewards.verifier import Verifier

Tell = Callable[[str], None]


def cold_start(told: ColdStart, tell: Tell = lambda line: None) -> Outcome:
    """Asks, checks, balances and writes. Started again it asks only what has no answer yet.

    Args:
        tell: is given a line on how it goes, now and then.

    Raises:
        UserError: the data, the teacher or the folder cannot be used as set; or nothing passes.
    """
    data = told.data
    reading = read_problems(
        data.name, data.path, columns=data.columns, limit=data.limit, bad_rows=data.bad_rows
    )
    if reading.account.kept < reading.account.rows:
        tell(account_table([reading.account]).rstrip())
    with open_journal(told.out / "answers.jsonl") as journal:
        tell(f"{len(reading.items)} problems; {len(journal)} answers in {told.out / 'answers.jsonl'}")
        asked = asyncio.run(_ask(told, reading.items, journal, tell))
        return _write(told, asked)


async def _ask(told: ColdStart, problems: Sequence[Problem], journal: Journal, tell: Tell) -> list[Asked]:
    async with _open(told) as teacher:
        with Verifier() as verifier:
            return await Rounds(told, teacher, journal, verifier, tell).ask(problems)


@asynccontextmanager
async def _open(told: ColdStart) -> AsyncIterator[Teacher]:
    if isinstance(told.teacher, OwnEngine):
        # Not at the top: an endpoint needs neither torch.distributed nor Megatron.
        from megatron_parallel_r1.coldstart.engine import open_engine

        with open_engine(told.teacher, told.template, told.seed) as teacher:
            yield teacher
    else:
        async with open_endpoint(told.teacher, told.concurrency) as teacher:
            yield teacher


def _write(told: ColdStart, asked: Sequence[Asked]) -> Outcome:
    candidates = [
        Candidate(index, sample.number, sample.checked.shape)
        for index, one in enumerate(asked)
        for sample in one.kept
        if sample.checked is not None
    ]
    chosen = balance(candidates, told.balance, told.seed)
    outcome = Outcome(
        problems=len(asked),
        hard=sum(one.rounds > 1 for one in asked),
        unsolved=tuple(one.problem.id for one in asked if not one.kept),
        unanswered=sum(sample.checked is None for one in asked for sample in one.samples),
        tally=_tally(told, asked),
        passed=Shapes.of(candidate.shape for candidate in candidates),
        written=Shapes.of(candidate.shape for candidate in chosen),
    )
    try:
        write_text(told.out / "report.md", outcome.markdown())
        write_text(told.out / "report.json", outcome.json())
        if chosen:
            write_traces(told.out / "traces.parquet", [_row(asked, candidate) for candidate in chosen])
    except OSError as error:
        raise UserError(f"{told.out}: {error.strerror or error}; make room and start again") from None
    if not chosen:
        raise UserError(f"{told.out}: no answer passes, so there are no traces; see report.md there for why")
    return outcome


def _tally(told: ColdStart, asked: Sequence[Asked]) -> Tally:
    seen = [
        Seen(one.problem.id, sample.number, sample.checked)
        for one in asked
        for sample in one.samples
        if sample.checked is not None
    ]
    return Tally.of(seen, told.shown, told.seed)


def _row(asked: Sequence[Asked], candidate: Candidate) -> Row:
    one = asked[candidate.problem]
    checked = one.samples[candidate.sample].checked
    assert checked is not None and checked.kept, "only what passes is a candidate"
    return Row(one.problem.prompt, checked.text, one.problem.answer)
