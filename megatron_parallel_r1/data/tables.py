"""Tables of parquet files, and of what `datasets` keeps on disk."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_parallel_r1.data.cells import BadCell, Cells, NumberedRow, UnusableRow
from megatron_parallel_r1.data.text_tables import first_line
from megatron_parallel_r1.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

_BATCH = 1000


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
                f"{self._path}: cannot be read as .parquet ({first_line(error)}); copy it again"
            ) from error


class ArrowTable:
    """A table that `datasets` keeps on disk: of the Hub, of its cached copy, or of `save_to_disk`."""

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
    """Yields row by row; parquet may hold text that is not UTF-8 and dates that Python lacks."""
    for batch in batches:
        try:
            yield from _to_rows(batch)
        except (ValueError, OverflowError):
            for row in range(batch.num_rows):
                yield _decode_row(batch.slice(row, 1))


def _decode_row(row: pa.RecordBatch | pa.Table) -> Cells | UnusableRow:
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            column.to_pylist()
        except UnicodeDecodeError as error:
            return BadCell(name, "text that is not UTF-8", f", at byte {error.start}")
        except (ValueError, OverflowError) as error:
            return BadCell(name, "cannot be read", f", {first_line(error)}")
    return _to_rows(row)[0]


def _to_rows(batch: pa.RecordBatch | pa.Table) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = batch.to_pylist()
    for field in batch.schema:
        if (shorten := _shortener(field.type)) is not None:
            for row in rows:
                row[field.name] = shorten(row[field.name])
    return rows


def _shortener(type: pa.DataType) -> Callable[[Any], Any] | None:
    """Returns a function that reads short floats as they print: float32 0.1 as 0.1, not 0.10000000149011612.

    None for a type without short floats.
    """
    import pyarrow as pa

    if pa.types.is_float32(type) or pa.types.is_float16(type):
        short = np.float32 if pa.types.is_float32(type) else np.float16
        return lambda value: None if value is None else float(str(short(value)))
    if pa.types.is_dictionary(type):
        return _shortener(type.value_type)
    if pa.types.is_list(type) or pa.types.is_large_list(type) or pa.types.is_fixed_size_list(type):
        inner = _shortener(type.value_type)
        return inner and (lambda items: items and [inner(item) for item in items])
    if pa.types.is_struct(type):
        fields = {field.name: shorten for field in type if (shorten := _shortener(field.type)) is not None}
        keep = fields.get
        if fields:
            return lambda cells: (
                cells and {name: f(cell) if (f := keep(name)) else cell for name, cell in cells.items()}
            )
    return None
