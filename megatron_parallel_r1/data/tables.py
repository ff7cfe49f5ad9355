"""Rows in columns: parquet files, and data sets of the Hugging Face Hub through `datasets`."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_parallel_r1.data.json_lines import JsonlTable
from megatron_parallel_r1.data.shard import Cells, Numbered, Shard, Unusable
from megatron_parallel_r1.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

_BATCH = 1000


class Parquet:
    """A parquet file, read a batch of rows at a time; memory also holds a row group as it is compressed.

    Raises:
        UserError: the file is not parquet.
    """

    def __init__(self, path: Path) -> None:
        self.label = str(path)
        self.name = path.name
        self._path = path
        with self._opened():
            pass

    def rows(self) -> Iterator[Numbered]:
        with self._opened() as file:
            yield from enumerate(_cells(file.iter_batches(_BATCH)))

    def pick(self, numbers: Sequence[int]) -> Iterator[Numbered]:
        """A row group with wanted rows is decoded once, batch by batch."""
        with self._opened() as file:
            first = at = 0
            for group in range(file.num_row_groups):
                after = first + file.metadata.row_group(group).num_rows
                stop = bisect_left(numbers, after, lo=at)
                if stop > at:
                    wanted = [int(number) - first for number in numbers[at:stop]]
                    batches = file.iter_batches(_BATCH, row_groups=[group])
                    yield from ((first + place, cells) for place, cells in _taken(batches, wanted))
                first, at = after, stop

    @contextmanager
    def _opened(self) -> Iterator[pq.ParquetFile]:
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
    """A split on the Hub, or of its cached copy; `datasets` keeps it on disk."""

    def __init__(self, dataset: Dataset, label: str) -> None:
        self.label = self.name = label
        self._dataset = dataset.with_format("arrow")

    def rows(self) -> Iterator[Numbered]:
        return enumerate(_cells(self._dataset.iter(_BATCH)))

    def pick(self, numbers: Sequence[int]) -> Iterator[Numbered]:
        for start in range(0, len(numbers), _BATCH):
            some = numbers[start : start + _BATCH]
            yield from zip(some, _cells([self._dataset[[int(number) for number in some]]]), strict=True)


_KINDS: dict[str, Callable[[Path], Shard]] = {
    ".parquet": Parquet,
    ".jsonl": JsonlTable,
    ".json": JsonlTable,
}


def open_hub(name: str, config: str | None, split: str) -> HubTable:
    """A split of a data set on the Hub, or of its cached copy.

    Raises:
        UserError: it cannot be loaded.
    """
    from datasets import load_dataset

    try:
        return HubTable(load_dataset(name, config, split=split), name)
    except Exception as error:  # the library raises many kinds, all of them the user's to mend
        raise UserError(
            f"data set {name}, split {split}: cannot load it from the Hugging Face Hub "
            f"({_first_line(error)}); check name and network, or give a local copy with path"
        ) from error


def open_files(path: Path) -> tuple[Shard, ...]:
    """A parquet or JSON Lines file, or all of them in a folder by name.

    Raises:
        UserError: there is no such file, its ending is another, or it is not what its ending says.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in _KINDS)
        if not files:
            raise UserError(f"{path}: holds no {', '.join(_KINDS)} file")
        return tuple(_KINDS[file.suffix](file) for file in files)
    if not path.is_file():
        raise UserError(f"{path}: no such data file")
    if path.suffix not in _KINDS:
        raise UserError(f"{path}: not one of {', '.join(_KINDS)}; convert it")
    return (_KINDS[path.suffix](path),)


def _taken(batches: Iterable[pa.RecordBatch], places: Sequence[int]) -> Iterator[Numbered]:
    """The rows at rising places, counted over all batches."""
    first = at = 0
    for batch in batches:
        stop = bisect_left(places, first + len(batch), lo=at)
        here = places[at:stop]
        if here:
            yield from zip(here, _cells([batch.take([place - first for place in here])]), strict=True)
        first, at = first + len(batch), stop


def _cells(batches: Iterable[pa.RecordBatch | pa.Table]) -> Iterator[Cells | Unusable]:
    """Row by row; parquet does not check that text is UTF-8 when it is read."""
    for batch in batches:
        try:
            yield from batch.to_pylist()
        except UnicodeDecodeError:
            for place in range(batch.num_rows):
                yield _one(batch.slice(place, 1))


def _one(row: pa.RecordBatch | pa.Table) -> Cells | Unusable:
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError as error:
        return Unusable("text that is not UTF-8", f", at byte {error.start} of a cell")


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
