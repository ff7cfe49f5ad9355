"""A cold start, from the data set to its output files.

<out>/answers.jsonl    every answer: a restarted run resumes from here
      traces.parquet   the traces that pass, balanced, in the format of Parallel-GSM8K
      report.md, report.json
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from megatron_parallel_r1.coldstart.balance import Candidate, balance
from megatron_parallel_r1.coldstart.endpoint_teacher import open_endpoint
from megatron_parallel_r1.coldstart.report import CheckedSample, ColdStartReport, ShapeCounts, Tally
from megatron_parallel_r1.coldstart.rounds import ProblemResult, Rounds
from megatron_parallel_r1.coldstart.settings import ColdStart, OwnEngine
from megatron_parallel_r1.coldstart.teacher import Journal, Teacher, open_journal
from megatron_parallel_r1.data.account import account_table
from megatron_parallel_r1.data.cells import as_value, at_path
from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.data.prompts import template_columns
from megatron_parallel_r1.data.readers import read_problems
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rewards.verifier import Verifier
from megatron_parallel_r1.utils.files import atomic_path, write_atomically

Log = Callable[[str], None]
# Three columns of text, as in the released file; behind them those that the prompt template shows.
SCHEMA = pa.schema(
    [("question", pa.large_string()), ("response", pa.large_string()), ("answer", pa.large_string())]
)


def cold_start(settings: ColdStart, log: Log = lambda line: None) -> ColdStartReport:
    """Requests, checks, balances and writes traces. A restarted run requests only missing answers.

    Args:
        log: receives a line of progress from time to time.

    Raises:
        UserError: the data, the teacher or the folder cannot be used as set, or no trace passes.
    """
    data, journal_file = settings.data, settings.out / "answers.jsonl"
    shown = template_columns(settings.template)
    if taken := next((name for name in shown if name in SCHEMA.names), None):
        raise UserError(f"template: traces.parquet has a column {taken} of its own; rename that of the data")
    dataset = read_problems(data.name, data.path, **data.read_options(shown))
    if before := next((problem.id for problem in dataset.items if problem.context), None):
        raise UserError(
            f"{dataset.account.source}: row {before} has messages before the question, which traces.parquet "
            "cannot hold; leave them out, or name the question alone, such as columns.prompt: messages.user"
        )
    if dataset.bad:
        log(account_table([dataset.account]).rstrip())
    for note in dataset.account.notes():
        log(note)
    with open_journal(journal_file) as journal:
        log(f"{len(dataset.items)} problems; {len(journal)} answers in {journal_file}")
        results = asyncio.run(_run_rounds(settings, dataset.items, journal, log))
        return _write(settings, results)


async def _run_rounds(
    settings: ColdStart, problems: Sequence[Problem], journal: Journal, log: Log
) -> list[ProblemResult]:
    async with _open_teacher(settings) as teacher:
        with Verifier() as verifier:
            return await Rounds(settings, teacher, journal, verifier, log).run(problems)


@asynccontextmanager
async def _open_teacher(settings: ColdStart) -> AsyncIterator[Teacher]:
    if isinstance(settings.teacher, OwnEngine):
        # A local import: an endpoint needs neither torch.distributed nor Megatron.
        from megatron_parallel_r1.coldstart.engine_teacher import open_engine

        with open_engine(
            settings.teacher, settings.template, settings.format, settings.seed
        ) as engine_teacher:
            yield engine_teacher
    else:
        async with open_endpoint(settings.teacher, settings.concurrency) as endpoint_teacher:
            yield endpoint_teacher


def _write(settings: ColdStart, results: Sequence[ProblemResult]) -> ColdStartReport:
    candidates = [
        Candidate(index, sample.number, sample.checked.shape)
        for index, result in enumerate(results)
        for sample in result.kept
        if sample.checked is not None
    ]
    chosen = balance(candidates, settings.balance, settings.seed)
    report = ColdStartReport(
        problems=len(results),
        hard=sum(result.rounds > 1 for result in results),
        unsolved=tuple(result.problem.id for result in results if not result.kept),
        unanswered=sum(sample.checked is None for result in results for sample in result.samples),
        tally=_tally(settings, results),
        passed=ShapeCounts.of(candidate.shape for candidate in candidates),
        written=ShapeCounts.of(candidate.shape for candidate in chosen),
    )
    try:
        write_atomically(settings.out / "report.md", report.markdown())
        write_atomically(settings.out / "report.json", report.json())
        if chosen:
            shown = template_columns(settings.template)
            rows = [_row(results[each.problem], each.sample, shown) for each in chosen]
            write_traces(settings.out / "traces.parquet", rows, shown)
    except OSError as error:
        raise UserError(f"{settings.out}: {error.strerror or error}; make room and start again") from None
    if not chosen:
        raise UserError(
            f"{settings.out}: no answer passes, so there are no traces; see report.md there for why"
        )
    return report


def _tally(settings: ColdStart, results: Sequence[ProblemResult]) -> Tally:
    samples = [
        CheckedSample(result.problem.id, sample.number, sample.checked)
        for result in results
        for sample in result.samples
        if sample.checked is not None
    ]
    return Tally.of(samples, settings.shown, settings.seed)


def _row(result: ProblemResult, sample: int, shown: Sequence[str]) -> dict[str, str]:
    checked = result.samples[sample].checked
    assert checked is not None and checked.kept, "only traces that pass are candidates"
    columns = {name: at_path(name, as_value)(result.problem.columns) for name in shown}
    problem = result.problem
    return {"question": problem.prompt, "response": checked.text, "answer": problem.answer, **columns}


def write_traces(path: Path, rows: Sequence[Mapping[str, str]], shown: Sequence[str]) -> None:
    """Writes a data set of traces atomically; equal rows give equal bytes.

    Args:
        rows: with the columns of `SCHEMA`, and those that the prompt template shows.
        shown: the names of the latter.
    """
    schema = pa.schema([*SCHEMA, *((name, pa.large_string()) for name in shown)])
    with atomic_path(path) as temporary:
        parquet.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema=schema), temporary)
