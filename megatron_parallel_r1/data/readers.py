"""Reads a data set into problems or worked examples, and accounts for every row.

`read_…` keeps all of them in memory. `stream_…` goes through the files once to learn which rows are of use,
and keeps their numbers alone; what it gives is shuffled with a buffer of bounded size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

from megatron_parallel_r1.data.account import Account, BadRow
from megatron_parallel_r1.data.problems import Example, Problem
from megatron_parallel_r1.data.sampler import Shuffled
from megatron_parallel_r1.data.schemas import CUSTOM, Columns, Schema, schema_of
from megatron_parallel_r1.data.shard import Cells
from megatron_parallel_r1.data.source import BadRows, Source, Streamed, problem_of
from megatron_parallel_r1.data.tables import open_files, open_hub
from megatron_parallel_r1.errors import UserError

T = TypeVar("T", Problem, Example)


@dataclass(frozen=True, slots=True)
class Reading(Generic[T]):
    """What a data set held.

    Attributes:
        items: in the order of the rows; `Problem.id` is the row's number, behind its file's name in a folder.
        account: of all rows.
    """

    items: tuple[T, ...]
    account: Account

    def in_order(self) -> Iterator[T]:
        """Every item once."""
        return iter(self.items)

    def without(self, ids: Collection[str]) -> Reading[T]:
        """The same but for the items of these ids; `account` still tells of all rows."""
        return replace(self, items=tuple(item for item in self.items if problem_of(item).id not in ids))

    def shuffled(self, seed: int) -> Shuffled[T]:
        """An endless order, for `ProblemStream`."""
        return Shuffled(self.items, seed)

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
) -> Reading[Problem]:
    """Problems with their right answers.

    Args:
        name: the data set's name on the Hub, which sets how rows are read; with `columns` any name, and
            `custom` for one that is on no Hub.
        path: a local parquet or JSON Lines copy, or a folder of them, to read instead of the Hub.
        columns: which hold what, in a data set of the user's own.
        split: on the Hub; the schema's usual one if None.
        limit: read only so many rows.
        bad_rows: stop at a bad row, or skip and count it.

    Raises:
        UserError: the data set is not known or cannot be loaded, a bad row under `refuse`, no good row.
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
) -> Reading[Example]:
    """Problems with a worked response, for a data set that has them; otherwise as `read_problems`."""
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
) -> Streamed[Problem]:
    """As `read_problems`, for files too large to hold: `buffer` problems are in memory at most."""
    return Streamed.survey(_problems(name, path, columns, split), bad_rows, limit, buffer)


def stream_examples(
    name: str,
    path: Path | None = None,
    *,
    columns: Columns | None = None,
    split: str | None = None,
    limit: int | None = None,
    bad_rows: BadRows = "refuse",
    buffer: int = 8192,
) -> Streamed[Example]:
    """As `read_examples`, for files too large to hold: `buffer` examples are in memory at most."""
    return Streamed.survey(_examples(name, path, columns, split), bad_rows, limit, buffer)


def _problems(name: str, path: Path | None, columns: Columns | None, split: str | None) -> Source[Problem]:
    schema = schema_of(name, columns)
    return _open(schema, lambda row, id: _problem(schema, row, id), path, split)


def _examples(name: str, path: Path | None, columns: Columns | None, split: str | None) -> Source[Example]:
    schema = schema_of(name, columns)
    response = schema.response
    if response is None:
        raise UserError(f"data set {name}: has no worked responses to fine-tune on")

    def example(row: Cells, id: str) -> Example:
        return Example(_problem(schema, row, id), response(row))

    return _open(schema, example, path, split)


def _problem(schema: Schema, row: Cells, id: str) -> Problem:
    return Problem(id, schema.prompt(row), (schema.answer(row),), schema.name)


def _open(schema: Schema, make: Callable[[Cells, str], T], path: Path | None, split: str | None) -> Source[T]:
    if path is not None:
        return Source(str(path), open_files(path), make, schema.repeats)
    if schema.name == CUSTOM:
        raise UserError("data set custom: give its path, or its name on the Hub instead of `custom`")
    table = open_hub(schema.name, schema.config, split or schema.split)
    return Source(schema.name, (table,), make, schema.repeats)


def _read(source: Source[T], limit: int | None, bad_rows: BadRows) -> Reading[T]:
    items: list[T] = []
    account, disputed = source.survey(bad_rows, limit, lambda _, item: items.append(item))
    return Reading(tuple(item for index, item in enumerate(items) if index not in disputed), account)
