"""Writes and checks the traces file: three columns of text, as in the released Parallel-GSM8K."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from megatron_parallel_r1.coldstart.checks import check
from megatron_parallel_r1.coldstart.report import CheckedSample, Tally
from megatron_parallel_r1.coldstart.settings import Check
from megatron_parallel_r1.coldstart.teacher import TeacherAnswer
from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rewards.verifier import Verifier
from megatron_parallel_r1.utils.files import atomic_path

SOURCE = "Parallel-R1/Parallel-GSM8K"
# As in the released file.
SCHEMA = pa.schema(
    [("question", pa.large_string()), ("response", pa.large_string()), ("answer", pa.large_string())]
)


@dataclass(frozen=True, slots=True)
class TraceRecord:
    """A row of the file."""

    question: str
    response: str
    answer: str


def write_traces(path: Path, records: Sequence[TraceRecord]) -> None:
    """Writes the file atomically; equal records give equal bytes."""
    columns = {
        "question": [record.question for record in records],
        "response": [record.response for record in records],
        "answer": [record.answer for record in records],
    }
    with atomic_path(path) as temporary:
        parquet.write_table(pa.table(columns, schema=SCHEMA), temporary)


def survey(path: Path, settings: Check | None = None, examples: int = 3) -> Tally:
    """Checks each row of a file as if a teacher had just written it: how many pass, and why others do not.

    Rows are numbered from 0. Unlike the readers of `data`, it accepts malformed responses, to count them.

    Raises:
        UserError: the file cannot be read, or a row lacks one of the three texts.
    """
    settings = settings or Check()
    with Verifier() as verifier:
        checked = [
            CheckedSample(
                str(index), 0, check(TeacherAnswer(row["response"], "stop"), problem, settings, verifier)
            )
            for index, (row, problem) in enumerate(_read(path))
        ]
    return Tally.of(checked, examples, seed=0)


def _read(path: Path) -> list[tuple[dict[str, str], Problem]]:
    """Reads each row with its problem."""
    try:
        rows = parquet.read_table(path, columns=SCHEMA.names).to_pylist()
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as parquet ({' '.join(str(error).split())[:200]})") from None
    for index, row in enumerate(rows):
        for name in SCHEMA.names:
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise UserError(
                    f"{path}: row {index} (from 0), column {name!r}: no text; fix or drop the row"
                )
    return [
        (row, Problem(str(index), row["question"], (row["answer"].strip(),), SOURCE))
        for index, row in enumerate(rows)
    ]
