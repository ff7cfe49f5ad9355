"""Tables of rows: JSON Lines, parquet, and data sets of the Hugging Face Hub."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_parallel_r1.data.cells import Cells, NumberedRow, RowTable, UnusableRow
from megatron_parallel_r1.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

_BATCH = 1000
_OFFSET_EVERY = 1024
_BOM = b"\xef\xbb\xbf"


class JsonlTable:
    """A file with one JSON object per line; a broken line costs one row, not the file.

    The number of a row is that of its line, from 0; blank lines are not rows. `rows` records the byte offset
    of every 1024th line, from which `pick` starts reading.
    """

    def __init__(self, path: Path) -> None:
        self.label = str(path)
        self.name = path.name
        self._path = path
        self._offsets = [0]

    def rows(self) -> Iterator[NumberedRow]:
        with self._path.open("rb") as file:
            offset = 0
            for number, line in enumerate(file):
                if number == len(self._offsets) * _OFFSET_EVERY:
                    self._offsets.append(offset)
                offset += len(line)
                if number == 0:
                    line = line.removeprefix(_BOM)
                if line.strip():
                    yield number, _parse_line(line)

    def pick(self, numbers: Sequence[int]) -> Iterator[NumberedRow]:
        with self._path.open("rb") as file:
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


def _parse_line(line: bytes) -> dict[str, Any] | UnusableRow:
    try:
        cells = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return UnusableRow("text that is not UTF-8", f", at byte {error.start} of the line")
    except json.JSONDecodeError as error:
        return UnusableRow("not JSON", f", {error.msg} at character {error.pos} of the line")
    except ValueError:  # Python's limit on the digits of an integer
        return UnusableRow("not JSON", ", a number of too many digits")
    except RecursionError:
        return UnusableRow("not JSON", ", nested too deep")
    if not isinstance(cells, dict):
        return UnusableRow(f"a {type(cells).__name__}, not an object with columns")
    return cells


class ParquetTable:
    """A parquet file, read in batches of rows; memory also holds one compressed row group.

    Raises:
        UserError: the file is not parquet.
    """

    def __init__(self, path: Path) -> None:
        self.label = str(path)
        self.name = path.name
        self._path = path
        with self._open():
            pass

    def rows(self) -> Iterator[NumberedRow]:
        with self._open() as file:
            yield from enumerate(_iterate_cells(file.iter_batches(_BATCH)))

    def pick(self, numbers: Sequence[int]) -> Iterator[NumberedRow]:
        """Yields the rows; decodes each row group that holds any of them once, batch by batch."""
        with self._open() as file:
            first = at = 0
            for group in range(file.num_row_groups):
                after = first + file.metadata.row_group(group).num_rows
                stop = bisect_left(numbers, after, lo=at)
                if stop > at:
                    wanted = [int(number) - first for number in numbers[at:stop]]
                    batches = file.iter_batches(_BATCH, row_groups=[group])
                    yield from ((first + row, cells) for row, cells in _take_rows(batches, wanted))
                first, at = after, stop

    @contextmanager
    def _open(self) -> Iterator[pq.ParquetFile]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(self._path) as file:
                yield file
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"{self._path}: cannot be read as .parquet ({_first_line(error)}); copy it again"
            ) from error


class HubTable:
    """A split of a data set on the Hub or of its cached copy; `datasets` keeps it on disk."""

    def __init__(self, dataset: Dataset, label: str) -> None:
        self.label = self.name = label
        self._dataset = dataset.with_format("arrow")

    def rows(self) -> Iterator[NumberedRow]:
        return enumerate(_iterate_cells(self._dataset.iter(_BATCH)))

    def pick(self, numbers: Sequence[int]) -> Iterator[NumberedRow]:
        for start in range(0, len(numbers), _BATCH):
            batch = numbers[start : start + _BATCH]
            cells = _iterate_cells([self._dataset[[int(number) for number in batch]]])
            yield from zip(batch, cells, strict=True)


_TABLES: dict[str, Callable[[Path], RowTable]] = {
    ".parquet": ParquetTable,
    ".jsonl": JsonlTable,
    ".json": JsonlTable,
}


def open_hub(name: str, config: str | None, split: str) -> HubTable:
    """Opens a split of a data set on the Hub, or its cached copy.

    Raises:
        UserError: the split cannot be loaded.
    """
    from datasets import load_dataset

    try:
        return HubTable(load_dataset(name, config, split=split), name)
    except Exception as error:  # the library raises many types, all of them for the user to fix
        raise UserError(
            f"data set {name}, split {split}: cannot load it from the Hugging Face Hub "
            f"({_first_line(error)}); check name and network, or give a local copy with path"
        ) from error


def open_files(path: Path) -> tuple[RowTable, ...]:
    """Opens a parquet or JSON Lines file, or all such files of a folder, sorted by name.

    Raises:
        UserError: there is no such file, its suffix is unknown, or its content does not match the suffix.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in _TABLES)
        if not files:
            raise UserError(f"{path}: holds no {', '.join(_TABLES)} file")
        return tuple(_TABLES[file.suffix](file) for file in files)
    if not path.is_file():
        raise UserError(f"{path}: no such data file")
    if path.suffix not in _TABLES:
        raise UserError(f"{path}: not one of {', '.join(_TABLES)}; convert it")
    return (_TABLES[path.suffix](path),)


def _take_rows(batches: Iterable[pa.RecordBatch], rows: Sequence[int]) -> Iterator[NumberedRow]:
    """Yields the rows of rising numbers, counted over all batches."""
    first = at = 0
    for batch in batches:
        stop = bisect_left(rows, first + len(batch), lo=at)
        here = rows[at:stop]
        if here:
            yield from zip(here, _iterate_cells([batch.take([row - first for row in here])]), strict=True)
        first, at = first + len(batch), stop


def _iterate_cells(batches: Iterable[pa.RecordBatch | pa.Table]) -> Iterator[Cells | UnusableRow]:
    """Yields row by row; reading parquet does not check that text is UTF-8."""
    for batch in batches:
        try:
            yield from batch.to_pylist()
        except UnicodeDecodeError:
            for row in range(batch.num_rows):
                yield _decode_row(batch.slice(row, 1))


def _decode_row(row: pa.RecordBatch | pa.Table) -> Cells | UnusableRow:
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError as error:
        return UnusableRow("text that is not UTF-8", f", at byte {error.start} of a cell")


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
