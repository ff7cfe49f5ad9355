"""Readers of one column of a row: they give text, or raise `BadCell`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from megatron_parallel_r1.data.shard import Cells, Unusable

CellReader = Callable[[Cells], str]


class BadCell(Unusable):
    """A column of a row that cannot be used, and why."""

    def __init__(self, column: str, what: str, detail: str = "") -> None:
        super().__init__(f"column {column!r}: {what}", detail)


def text(column: str, other: str | None = None) -> CellReader:
    """Reads a column of text, which copies of the data set may call `other`."""

    def read(row: Cells) -> str:
        name = other if other is not None and column not in row and other in row else column
        return as_text(row.get(name), name)

    return read


def value(column: str) -> CellReader:
    """Reads an answer kept as text or as a number."""
    return lambda row: as_value(row.get(column), column)


def at_path(path: str, convert: Callable[[object, str], str]) -> CellReader:
    """Reads a column, or what lies in it: `reward_model.ground_truth`, `prompt.0.content`.

    A column whose own name has the dots comes first.
    """

    def read(row: Cells) -> str:
        if path in row:
            return convert(row[path], path)
        cell: Any = row
        for step in path.split("."):
            if isinstance(cell, list) and step.isdecimal() and int(step) < len(cell):
                cell = cell[int(step)]
            elif isinstance(cell, dict) and step in cell:
                cell = cell[step]
            else:
                raise BadCell(path, "missing", f"; the row has {', '.join(map(repr, row))}")
        return convert(cell, path)

    return read


def as_text(cell: object, column: str) -> str:
    """Text that is not blank, stripped."""
    if cell is None:
        raise BadCell(column, "missing")
    if not isinstance(cell, str):
        raise BadCell(column, f"{type(cell).__name__} instead of text")
    if not cell.strip():
        raise BadCell(column, "blank")
    try:
        cell.encode()
    except UnicodeEncodeError as error:  # JSON may escape half of a pair; no tokenizer takes it
        raise BadCell(column, "a lone surrogate", f", at character {error.start}") from None
    return cell.strip()


def as_value(cell: object, column: str) -> str:
    """As `as_text`, or a number; a whole one is written without its fraction."""
    if isinstance(cell, bool) or not isinstance(cell, (int, float)):
        return as_text(cell, column)
    if isinstance(cell, int):
        return str(cell)
    if not math.isfinite(cell):
        raise BadCell(column, "a number that is not finite")
    return str(int(cell)) if cell == int(cell) else str(cell)
