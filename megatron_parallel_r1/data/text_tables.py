"""Tables of text files: JSON Lines, JSON arrays and CSV, plain or compressed.

They are read here instead of by `datasets`, which guesses types (an answer of 007 becomes 7) and refuses a
whole file for one bad row.
"""

from __future__ import annotations

import csv
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_parallel_r1.data.cells import JSON, Cells, NumberedRow, RowTable, UnusableRow
from megatron_parallel_r1.errors import UserError

# Suffixes that may follow that of a text file; Arrow decompresses them.
COMPRESSED = (".gz", ".zst", ".bz2", ".lz4")
_OFFSET_EVERY = 1024
_BOM = b"\xef\xbb\xbf"
_PEEK = 4096
_LONGEST_CELL = 2**31 - 1


@contextmanager
def open_bytes(path: Path) -> Iterator[io.BufferedReader]:
    """Opens a file, decompressed if its suffix says that it is compressed.

    Raises:
        UserError: it cannot be read or decompressed, also later, while it is being read.
    """
    import pyarrow as pa

    try:
        if path.suffix in COMPRESSED:
            with io.BufferedReader(pa.input_stream(str(path), compression="detect")) as file:
                yield file
        else:
            with path.open("rb") as file:
                yield file
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); copy it again") from None


class JsonlTable:
    """A file with one JSON object per line; a broken line costs one row, not the file.

    The number of a row is that of its line, from 0; blank lines are not rows. `rows` records the byte offset
    of every 1024th line, from which `pick` starts reading; in a compressed file it reads from the start.
    """

    def __init__(self, path: Path) -> None:
        self.label = str(path)
        self.name = path.name
        self._path = path
        self._offsets = [0]

    def rows(self) -> Iterator[NumberedRow]:
        seekable = self._path.suffix not in COMPRESSED
        with open_bytes(self._path) as file:
            offset = 0
            for number, line in enumerate(file):
                if seekable and number == len(self._offsets) * _OFFSET_EVERY:
                    self._offsets.append(offset)
                offset += len(line)
                if number == 0:
                    line = line.removeprefix(_BOM)
                if line.strip():
                    yield number, _parse_line(line)

    def pick(self, numbers: Sequence[int]) -> Iterator[NumberedRow]:
        with open_bytes(self._path) as file:
            next_line = 0
            for number in numbers:
                mark = min(number // _OFFSET_EVERY, len(self._offsets) - 1)
                if mark * _OFFSET_EVERY > next_line:
                    file.seek(self._offsets[mark])
                    next_line = mark * _OFFSET_EVERY
                line = b""
                while next_line <= number:
                    line = file.readline()
                    next_line += 1
                yield number, _parse_line(line.removeprefix(_BOM) if number == 0 else line)


def _parse_line(line: bytes) -> Cells | UnusableRow:
    try:
        return _as_cells(JSON.decode(line.decode()))
    except UnicodeDecodeError as error:
        return UnusableRow("text that is not UTF-8", f", at byte {error.start} of the line")
    except json.JSONDecodeError as error:
        return UnusableRow("not JSON", f", {error.msg} at character {error.pos} of the line")
    except ValueError:  # Python's limit on the digits of an integer
        return UnusableRow("not JSON", ", a number of too many digits")
    except RecursionError:
        return UnusableRow("not JSON", ", nested too deep")


def _as_cells(value: Any) -> dict[str, Any] | UnusableRow:
    if not isinstance(value, dict):
        return UnusableRow(f"a {type(value).__name__}, not an object with columns")
    return value


class ScannedTable(ABC):
    """A file without an index, which `pick` reads from its start."""

    def __init__(self, path: Path) -> None:
        self.label = str(path)
        self.name = path.name
        self._path = path

    @abstractmethod
    def rows(self) -> Iterator[NumberedRow]: ...

    def pick(self, numbers: Sequence[int]) -> Iterator[NumberedRow]:
        rows = self.rows()
        for number in numbers:
            if (found := next((row for row in rows if row[0] == number), None)) is not None:
                yield found


class JsonArrayTable(ScannedTable):
    """A file that holds one JSON array of objects, all of it in memory while it is read."""

    def rows(self) -> Iterator[NumberedRow]:
        number = 0
        try:
            with open_bytes(self._path) as file:
                text = file.read().decode("utf-8-sig").strip()
            at = _past_blank(text, 1)
            while text[at : at + 1] != "]":
                value, at = JSON.raw_decode(text, at)
                yield number, _as_cells(value)
                number += 1
                at = _past_blank(text, at)
                if text[at : at + 1] == ",":
                    at = _past_blank(text, at + 1)
                elif text[at : at + 1] != "]":
                    raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
            if text[at + 1 :]:
                raise json.JSONDecodeError("More after the end of the array", text, at + 1)
        except RecursionError:
            raise UserError(f"{self._path}: row {number} (from 0), not JSON, nested too deep") from None
        except ValueError as error:  # also of bytes that are not UTF-8, and of numbers with too many digits
            raise UserError(f"{self._path}: row {number} (from 0), not JSON, {first_line(error)}") from None


def _past_blank(text: str, at: int) -> int:
    while text[at : at + 1].isspace():
        at += 1
    return at


class CsvTable(ScannedTable):
    """A file of values separated by commas, in `.tsv` by tabs, below one line of column names.

    Every cell is text. Blank lines are not rows.
    """

    def rows(self) -> Iterator[NumberedRow]:
        tabs = ".tsv" in self._path.suffixes
        number = 0
        csv.field_size_limit(_LONGEST_CELL)
        try:
            with open_bytes(self._path) as file:
                # Bytes that are not UTF-8 become lone surrogates, which cost the row that uses the cell.
                lines = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
                reader = csv.DictReader(lines, delimiter="\t" if tabs else ",", strict=True)
                columns = reader.fieldnames or ()
                if len(set(columns)) < len(columns):
                    raise UserError(f"{self._path}: two columns have one name in {list(columns)}; rename one")
                for cells in reader:
                    spare = cells.pop(None, None)
                    width = len(columns) + len(spare or ())
                    unusable = UnusableRow(f"more cells than columns, {width} instead of {len(columns)}")
                    yield number, unusable if spare else cells
                    number += 1
        except csv.Error as error:
            raise UserError(f"{self._path}: row {number} (from 0), not CSV, {error}; fix it") from None


def open_json(path: Path) -> RowTable:
    """Opens JSON Lines or an array, whichever the file holds."""
    with open_bytes(path) as file:
        start = file.read(_PEEK).removeprefix(_BOM).lstrip()
    if start.startswith(b"{") and not start[1:].split(b"\n")[0].strip() and start[1:].strip():
        raise UserError(f"{path}: one JSON object over several lines; write an array of rows, or JSON Lines")
    return JsonArrayTable(path) if start.startswith(b"[") else JsonlTable(path)


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its type's name."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
