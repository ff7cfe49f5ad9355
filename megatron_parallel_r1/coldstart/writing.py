"""The data set in the shape of the released Parallel-GSM8K: three columns of text."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

# As the released file has them.
SCHEMA = pa.schema(
    [("question", pa.large_string()), ("response", pa.large_string()), ("answer", pa.large_string())]
)


@dataclass(frozen=True, slots=True)
class Row:
    question: str
    response: str
    answer: str


def write_traces(path: Path, rows: Sequence[Row]) -> None:
    """Writes the file, whole or not at all; equal rows give equal bytes."""
    columns = {
        "question": [row.question for row in rows],
        "response": [row.response for row in rows],
        "answer": [row.answer for row in rows],
    }
    table = pa.table(columns, schema=SCHEMA)
    whole(path, lambda fresh: parquet.write_table(table, fresh))


def write_text(path: Path, text: str) -> None:
    """Writes a text, whole or not at all."""
    whole(path, lambda fresh: fresh.write_text(text, encoding="utf-8"))


def whole(path: Path, write: Callable[[Path], object]) -> None:
    """Has `write` make a file beside `path`, and puts it there once it is on the disk."""
    fresh = path.with_name(path.name + ".new")
    write(fresh)
    with open(fresh, "rb") as file:
        os.fsync(file.fileno())
    os.replace(fresh, path)
