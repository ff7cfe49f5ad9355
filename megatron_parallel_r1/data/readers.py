"""Reads a data set into problems or worked examples, and accounts for every row.

`read_*` keeps all items in memory. `stream_*` reads the files once, keeps only the numbers of usable rows,
and shuffles through a buffer of bounded size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

from megatron_parallel_r1.data.account import BadRow, RowAccount
from megatron_parallel_r1.data.cells import Cells
from megatron_parallel_r1.data.problems import Example, Problem
from megatron_parallel_r1.data.sampler import ShuffledEpochs
from megatron_parallel_r1.data.schemas import CUSTOM, Columns, Schema, schema_of
from megatron_parallel_r1.data.source import BadRows, RowSource, StreamedDataset, problem_of
from megatron_parallel_r1.data.tables import open_files, open_hub
from megatron_parallel_r1.errors import UserError

T = TypeVar("T", Problem, Example)


@dataclass(frozen=True, slots=True)
class LoadedDataset(Generic[T]):
    """A data set in memory.

    Attributes:
        items: the items in the order of the rows; `Problem.id` is the row's number, after its file's name in
            a folder.
        account: the account of all rows.
    """

    items: tuple[T, ...]
    account: RowAccount

    def in_order(self) -> Iterator[T]:
        """Yields every item once."""
        return iter(self.items)

    def without(self, ids: Collection[str]) -> LoadedDataset[T]:
        """Returns the data set without the items of these ids; `account` still counts all rows."""
        return replace(self, items=tuple(item for item in self.items if problem_of(item).id not in ids))

    def shuffled(self, seed: int) -> ShuffledEpochs[T]:
        """Returns an endless order, for `ProblemStream`."""
        return ShuffledEpochs(self.items, seed)

    @property
    def rows(self) -> int:
        return self.account.rows

    @property
    def bad(self) -> tuple[BadRow, ...]:
        return self.account.bad

    @property
    def repeated(self) -> int:
        return self.account.repeated

    @property
    def disputed(self) -> int:
        return self.account.disputed


def read_problems(
    name: str,
    path: Path | None = None,
    *,
    columns: Columns | None = None,
    split: str | None = None,
    limit: int | None = None,
    bad_rows: BadRows = "refuse",
) -> LoadedDataset[Problem]:
    """Reads problems with their right answers.

    Args:
        name: the name on the Hub, which selects the schema; with `columns` any name, or `custom` for a data
            set that is not on the Hub.
        path: a local parquet or JSON Lines copy, or a folder of them, read instead of the Hub.
        columns: the columns of the user's own data set.
        split: the split on the Hub; None: the schema's default.
        limit: the maximum number of rows to read.
        bad_rows: stop at a bad row, or skip and count it.

    Raises:
        UserError: the data set is unknown or cannot be loaded, a row is bad under `refuse`, or no row is
            usable.
    """
    return _read(_problems(name, path, columns, split), limit, bad_rows)


def read_examples(
    name: str,
    path: Path | None = None,
    *,
    columns: Columns | None = None,
    split: str | None = None,
    limit: int | None = None,
    bad_rows: BadRows = "refuse",
) -> LoadedDataset[Example]:
    """Reads problems with a worked response, where the data set has them; otherwise like `read_problems`."""
    return _read(_examples(name, path, columns, split), limit, bad_rows)


def stream_problems(
    name: str,
    path: Path | None = None,
    *,
    columns: Columns | None = None,
    split: str | None = None,
    limit: int | None = None,
    bad_rows: BadRows = "refuse",
    buffer: int = 8192,
) -> StreamedDataset[Problem]:
    """Like `read_problems`, for files larger than memory: holds at most `buffer` problems."""
    return StreamedDataset.survey(_problems(name, path, columns, split), bad_rows, limit, buffer)


def stream_examples(
    name: str,
    path: Path | None = None,
    *,
    columns: Columns | None = None,
    split: str | None = None,
    limit: int | None = None,
    bad_rows: BadRows = "refuse",
    buffer: int = 8192,
) -> StreamedDataset[Example]:
    """Like `read_examples`, for files larger than memory: holds at most `buffer` examples."""
    return StreamedDataset.survey(_examples(name, path, columns, split), bad_rows, limit, buffer)


def _problems(name: str, path: Path | None, columns: Columns | None, split: str | None) -> RowSource[Problem]:
    schema = schema_of(name, columns)
    return _open(schema, lambda row, id: replace(_problem(schema, row, id), columns=row), path, split)


def _examples(name: str, path: Path | None, columns: Columns | None, split: str | None) -> RowSource[Example]:
    schema = schema_of(name, columns)
    response = schema.response
    if response is None:
        raise UserError(f"data set {name}: has no worked responses to fine-tune on")

    def example(row: Cells, id: str) -> Example:
        return Example(_problem(schema, row, id), response(row))

    return _open(schema, example, path, split)


def _problem(schema: Schema, row: Cells, id: str) -> Problem:
    return Problem(id, schema.prompt(row), (schema.answer(row),), schema.name)


def _open(
    schema: Schema, build: Callable[[Cells, str], T], path: Path | None, split: str | None
) -> RowSource[T]:
    if path is not None:
        return RowSource(str(path), open_files(path), build, schema.repeats)
    if schema.name == CUSTOM:
        raise UserError("data set custom: give its path, or its name on the Hub instead of `custom`")
    table = open_hub(schema.name, schema.config, split or schema.split)
    return RowSource(schema.name, (table,), build, schema.repeats)


def _read(source: RowSource[T], limit: int | None, bad_rows: BadRows) -> LoadedDataset[T]:
    items: list[T] = []
    account, disputed = source.survey(bad_rows, limit, lambda _, item: items.append(item))
    return LoadedDataset(tuple(item for index, item in enumerate(items) if index not in disputed), account)
