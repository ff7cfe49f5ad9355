"""The check of a finished data set: how many of its traces pass, and why the rest do not."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from megatron_parallel_r1.coldstart.checks import check
from megatron_parallel_r1.coldstart.report import Seen, Tally
from megatron_parallel_r1.coldstart.settings import Check
from megatron_parallel_r1.coldstart.teacher import Answer
from megatron_parallel_r1.coldstart.writing import SCHEMA
from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rewards.verifier import Verifier

SOURCE = "Parallel-R1/Parallel-GSM8K"


def survey(path: Path, asked: Check | None = None, shown: int = 3) -> Tally:
    """Checks each row of a file in the shape of Parallel-GSM8K as if a teacher had just written it.

    Rows are numbered from 0. Unlike a reader it takes malformed responses: those it is after.

    Raises:
        UserError: the file cannot be read, or a row lacks one of the three texts.
    """
    with Verifier() as verifier:
        seen = [
            Seen(str(index), 0, check(Answer(row["response"], "stop"), problem, asked or Check(), verifier))
            for index, (row, problem) in enumerate(_problems(path))
        ]
    return Tally.of(seen, shown, seed=0)


def _problems(path: Path) -> list[tuple[dict[str, str], Problem]]:
    """Each row with its problem."""
    try:
        rows = parquet.read_table(path, columns=SCHEMA.names).to_pylist()
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as parquet ({' '.join(str(error).split())[:200]})") from None
    for index, row in enumerate(rows):
        for name in SCHEMA.names:
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise UserError(
                    f"{path}: row {index} (from 0), column {name!r}: no text; mend or drop the row"
                )
    return [
        (row, Problem(str(index), row["question"], (row["answer"].strip(),), SOURCE))
        for index, row in enumerate(rows)
    ]
