"""An open data set: its rows, the items that they become, and which of them are usable."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import Generic, Literal, TypeVar, cast

import numpy as np

from megatron_parallel_r1.data.account import BadRow, RowAccount
from megatron_parallel_r1.data.cells import Cells, RowTable, UnusableRow
from megatron_parallel_r1.data.problems import Example, Problem
from megatron_parallel_r1.data.sampler import Int64, RowLocation, StreamedShuffle
from megatron_parallel_r1.errors import UserError

T = TypeVar("T", Problem, Example)
BadRows = Literal["refuse", "skip"]


def problem_of(item: Problem | Example) -> Problem:
    """Returns the problem itself, or that of a worked example."""
    return item.problem if isinstance(item, Example) else item


@dataclass(frozen=True, slots=True, eq=False)
class RowSource(Generic[T]):
    """A data set and how to read it.

    Attributes:
        label: the name in messages.
        tables: the files, in order.
        build: builds an item from a row's cells and its id; raises `UnusableRow`.
        repeats: rows may repeat a problem; repeats are dropped.
    """

    label: str
    tables: tuple[RowTable, ...]
    build: Callable[[Cells, str], T]
    repeats: bool

    def survey(
        self, bad_rows: BadRows, limit: int | None, take: Callable[[RowLocation, T], None]
    ) -> tuple[RowAccount, frozenset[int]]:
        """Reads every row once and passes each usable one that repeats no other to `take`.

        Returns:
            The account, and the indices (from 0) of the items passed that must be dropped as disputed.

        Raises:
            UserError: a row is bad under `refuse`, or no row is usable.
        """
        duplicates, rows, taken = DuplicateProblems(), 0, 0
        bad: list[BadRow] = []
        for location, cells in islice(self._rows(), limit):
            rows += 1
            try:
                item = self._item(location, cells)
            except UnusableRow as error:
                bad.append(self._bad_row(location, error))
                if bad_rows == "refuse":
                    raise UserError(
                        f"{self.label}: {bad[0]}; fix it, or skip such rows with bad_rows=skip"
                    ) from None
                continue
            if not self.repeats or duplicates.is_new(problem_of(item)):
                take(location, item)
                taken += 1
        if not taken:
            raise UserError(f"{self.label}: no usable row{f'; {bad[0]}' if bad else ''}")
        disputed = duplicates.disputed()
        account = RowAccount(self.label, rows, taken - len(disputed), tuple(bad), *duplicates.counts())
        return account, disputed

    def load(self, locations: Sequence[RowLocation]) -> Iterator[T]:
        """Yields the items at rising locations that a survey accepted.

        Raises:
            UserError: a file has changed since the survey.
        """
        for table, here in groupby(locations, key=lambda location: location[0]):
            yield from self.load_table(table, [row for _, row in here])

    def load_table(self, table: int, rows: Sequence[int]) -> Iterator[T]:
        """Yields the items of one table, as `load` does."""
        count = 0
        for row, cells in self.tables[table].pick(rows):
            try:
                yield self._item((table, row), cells)
            except UnusableRow as error:
                raise self._changed(table, str(error)) from None
            count += 1
        if count < len(rows):
            raise self._changed(table, f"{len(rows) - count} rows are gone")

    def id_of(self, location: RowLocation) -> str:
        """Returns the number of a row, after the name of its file if there are several."""
        table, row = location
        return f"{self.tables[table].name}:{row}" if len(self.tables) > 1 else str(row)

    def _rows(self) -> Iterator[tuple[RowLocation, Cells | UnusableRow]]:
        for index, table in enumerate(self.tables):
            for row, cells in table.rows():
                yield (index, row), cells

    def _item(self, location: RowLocation, cells: Cells | UnusableRow) -> T:
        if isinstance(cells, UnusableRow):
            raise cells
        return self.build(cells, self.id_of(location))

    def _bad_row(self, location: RowLocation, error: UnusableRow) -> BadRow:
        table, row = location
        file = self.tables[table].name if len(self.tables) > 1 else None
        return BadRow(row, error.what, error.detail, file)

    def _changed(self, table: int, what: str) -> UserError:
        label = self.tables[table].label
        return UserError(f"{label}: changed while it was in use ({what}); restore it, or start a new run")


@dataclass(frozen=True, slots=True, eq=False)
class StreamedDataset(Generic[T]):
    """A data set of any size: holds the numbers of its usable rows; the rows stay in their files.

    Attributes:
        account: the account of all rows.
        rows: for each table, the rising numbers of the rows to use; 8 bytes per row.
        buffer: the maximum number of items in memory when shuffled.
    """

    source: RowSource[T]
    account: RowAccount
    rows: tuple[Int64, ...]
    buffer: int

    @classmethod
    def survey(
        cls, source: RowSource[T], bad_rows: BadRows, limit: int | None, buffer: int
    ) -> StreamedDataset[T]:
        """Reads every row once and keeps none. Raises as `RowSource.survey`."""
        usable = [array("q") for _ in source.tables]
        account, disputed = source.survey(
            bad_rows, limit, lambda location, _: usable[location[0]].append(location[1])
        )
        rows, first = [], 0
        for numbers in usable:
            rows_N = np.array(numbers, np.int64)
            rows.append(np.delete(rows_N, [i - first for i in disputed if first <= i < first + len(rows_N)]))
            first += len(rows_N)
        return cls(source, account, tuple(rows), buffer)

    def __len__(self) -> int:
        return sum(map(len, self.rows))

    def in_order(self) -> Iterator[T]:
        """Yields every item once, in the order of the files."""
        for table, rows_N in enumerate(self.rows):
            yield from self.source.load_table(table, cast("Sequence[int]", rows_N))

    def without(self, ids: Collection[str]) -> StreamedDataset[T]:
        """Returns the data set without the items of these ids."""
        rows = []
        for table, rows_N in enumerate(self.rows):
            keep_N = np.array([self.source.id_of((table, int(row))) not in ids for row in rows_N], bool)
            rows.append(rows_N[keep_N])
        return replace(self, rows=tuple(rows))

    def shuffled(self, seed: int) -> StreamedShuffle[T]:
        """Returns an endless order, for `ProblemStream`."""
        return StreamedShuffle(self.rows, self.source.load, self.buffer, seed)


@dataclass(slots=True)
class _Copies:
    first: int
    answers: tuple[str, ...]
    count: int = 1
    agree: bool = True


class DuplicateProblems:
    """Finds problems whose prompts differ at most in white space."""

    def __init__(self) -> None:
        self._copies: dict[bytes, _Copies] = {}

    def is_new(self, problem: Problem) -> bool:
        """Returns whether no earlier problem is the same; new ones are numbered from 0."""
        words = " ".join(problem.prompt.split())
        # 16 bytes: two of 10^8 different problems collide with a probability below 10^-22.
        key = hashlib.blake2b(words.encode(), digest_size=16).digest()
        copies = self._copies.get(key)
        if copies is None:
            self._copies[key] = _Copies(len(self._copies), problem.answers)
            return True
        copies.count += 1
        copies.agree &= copies.answers == problem.answers
        return False

    def disputed(self) -> frozenset[int]:
        """Returns the numbers of new problems of which some copy has another answer."""
        return frozenset(copies.first for copies in self._copies.values() if not copies.agree)

    def counts(self) -> tuple[int, int]:
        """Returns the number of repeats whose copies all agree, and of rows whose copies do not."""
        repeated = sum(copies.count - 1 for copies in self._copies.values() if copies.agree)
        return repeated, sum(copies.count for copies in self._copies.values() if not copies.agree)
