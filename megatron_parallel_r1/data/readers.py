"""Reads a known data set into problems or worked examples, and accounts for every row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from megatron_parallel_r1.data.problems import Example, Problem
from megatron_parallel_r1.data.schemas import BadCell, Row, Schema, schema_of
from megatron_parallel_r1.data.tables import open_file, open_hub, rows
from megatron_parallel_r1.errors import UserError

T = TypeVar("T", Problem, Example)
BadRows = Literal["refuse", "skip"]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that was skipped: its number from 0, and what was wrong with it."""

    row: int
    what: str


@dataclass(frozen=True, slots=True)
class Reading(Generic[T]):
    """What a data set held: rows == items + bad + repeated + disputed.

    Attributes:
        items: in the order of the rows; `Problem.id` is the row's number.
        rows: read in all.
        bad: skipped since a column was not usable.
        repeated: dropped since an earlier row has the same problem.
        disputed: dropped since rows with the same problem have different answers.
    """

    items: tuple[T, ...]
    rows: int
    bad: tuple[BadRow, ...]
    repeated: int
    disputed: int


def read_problems(
    name: str,
    path: Path | None = None,
    *,
    split: str | None = None,
    limit: int | None = None,
    bad_rows: BadRows = "refuse",
) -> Reading[Problem]:
    """Problems with their right answers.

    Args:
        name: the data set's name on the Hub; it sets how rows are read.
        path: a local parquet or JSON-lines copy to read instead of the Hub.
        split: on the Hub; the schema's usual one if None.
        limit: read only so many rows.
        bad_rows: stop at a bad row, or skip and count it.

    Raises:
        UserError: the data set is not known or cannot be loaded, a bad row under `refuse`, no good row.
    """
    schema = schema_of(name)
    return _read(schema, lambda row, id: _problem(schema, row, id), path, split, limit, bad_rows)


def read_examples(
    name: str,
    path: Path | None = None,
    *,
    split: str | None = None,
    limit: int | None = None,
    bad_rows: BadRows = "refuse",
) -> Reading[Example]:
    """Problems with a worked response, for a data set that has them; otherwise as `read_problems`."""
    schema = schema_of(name)
    response = schema.response
    if response is None:
        raise UserError(f"data set {name}: has no worked responses to fine-tune on")

    def example(row: Row, id: str) -> Example:
        return Example(_problem(schema, row, id), response(row))

    return _read(schema, example, path, split, limit, bad_rows)


def _problem(schema: Schema, row: Row, id: str) -> Problem:
    return Problem(id, schema.prompt(row), (schema.answer(row),), schema.name)


def _read(
    schema: Schema,
    make: Callable[[Row, str], T],
    path: Path | None,
    split: str | None,
    limit: int | None,
    bad_rows: BadRows,
) -> Reading[T]:
    if path is None:
        where = schema.name
        table = open_hub(schema.name, schema.config, split or schema.split)
    else:
        where = str(path)
        table = open_file(path)
    items: list[T] = []
    bad: list[BadRow] = []
    for index, row in enumerate(islice(rows(table), limit)):
        try:
            items.append(_checked(make, row, str(index)))
        except BadCell as error:
            if bad_rows == "refuse":
                raise UserError(
                    f"{where}: row {index} (from 0), {error}; mend it, or skip such rows with bad_rows=skip"
                ) from None
            bad.append(BadRow(index, str(error)))
    if not items:
        first = f"; row {bad[0].row} (from 0), {bad[0].what}" if bad else ""
        raise UserError(f"{where}: no usable row for {schema.name}{first}")
    total = len(items) + len(bad)
    if not schema.repeats:
        return Reading(tuple(items), total, tuple(bad), repeated=0, disputed=0)
    kept, disputed = _without_repeats(items)
    repeated = len(items) - len(kept) - disputed
    return Reading(kept, total, tuple(bad), repeated, disputed)


def _checked(make: Callable[[Row, str], T], row: Mapping[str, Any] | UnicodeDecodeError, id: str) -> T:
    if isinstance(row, UnicodeDecodeError):
        raise BadCell("?", "text that is not UTF-8")
    return make(row, id)


def _without_repeats(items: Iterable[T]) -> tuple[tuple[T, ...], int]:
    """The first of each problem; and how many rows went because copies of their problem disagree."""
    copies: dict[str, list[T]] = {}
    for item in items:
        copies.setdefault(_problem_of(item).prompt, []).append(item)
    agreed = [group for group in copies.values() if len({_problem_of(item).answers for item in group}) == 1]
    disputed = sum(map(len, copies.values())) - sum(map(len, agreed))
    return tuple(group[0] for group in agreed), disputed


def _problem_of(item: Problem | Example) -> Problem:
    return item.problem if isinstance(item, Example) else item
