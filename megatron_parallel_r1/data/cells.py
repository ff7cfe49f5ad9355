"""Rows of a data set as they are read: tables of numbered rows, and readers of single columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

Cells = Mapping[str, Any]
CellReader = Callable[[Cells], str]


class UnusableRow(ValueError):
    """The reason why a row cannot be used.

    Attributes:
        what: the kind of fault, which other rows share.
        detail: the part that is this row's own.
    """

    def __init__(self, what: str, detail: str = "") -> None:
        super().__init__(what + detail)
        self.what = what
        self.detail = detail


class BadCell(UnusableRow):
    """The reason why a column of a row cannot be used."""

    def __init__(self, column: str, what: str, detail: str = "") -> None:
        super().__init__(f"column {column!r}: {what}", detail)


# The number of a row, and its cells or the reason why they cannot be read.
NumberedRow = tuple[int, Cells | UnusableRow]


class RowTable(Protocol):
    """Rows in a fixed order, never all in memory: a file, or a data set on the Hub.

    Attributes:
        label: the name in messages, as the user wrote it.
        name: the short name, unique within a folder.
    """

    label: str
    name: str

    def rows(self) -> Iterator[NumberedRow]:
        """Yields every row; the numbers rise."""
        ...

    def pick(self, numbers: Sequence[int]) -> Iterator[NumberedRow]:
        """Yields the rows of rising `numbers`, all of which `rows` has yielded."""
        ...


def text(column: str, alias: str | None = None) -> CellReader:
    """Reads a column of text, which some copies of the data set call `alias`."""

    def read(row: Cells) -> str:
        name = alias if alias is not None and column not in row and alias in row else column
        return as_text(row.get(name), name)

    return read


def value(column: str) -> CellReader:
    """Reads an answer stored as text or as a number."""
    return lambda row: as_value(row.get(column), column)


def at_path(path: str, convert: Callable[[object, str], str]) -> CellReader:
    """Reads a column or a value inside it: `reward_model.ground_truth`, `prompt.0.content`.

    A column whose own name contains the dots takes precedence.
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
    """Returns non-blank text, stripped."""
    if cell is None:
        raise BadCell(column, "missing")
    if not isinstance(cell, str):
        raise BadCell(column, f"{type(cell).__name__} instead of text")
    if not cell.strip():
        raise BadCell(column, "blank")
    try:
        cell.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair; no tokenizer accepts it
        raise BadCell(column, "a lone surrogate", f", at character {error.start}") from None
    return cell.strip()


def as_value(cell: object, column: str) -> str:
    """Returns text as `as_text` does, or a number; a whole number is written without its fraction."""
    if isinstance(cell, bool) or not isinstance(cell, int | float):
        return as_text(cell, column)
    if isinstance(cell, int):
        return str(cell)
    if not math.isfinite(cell):
        raise BadCell(column, "a number that is not finite")
    return str(int(cell)) if cell == int(cell) else str(cell)
