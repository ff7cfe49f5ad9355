"""An open data set: its rows, the items that they become, and which of them are usable."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import Generic, Literal, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from megatron_parallel_r1.data.account import BadRow, RowAccount
from megatron_parallel_r1.data.cells import Cells, RowTable, UnusableRow
from megatron_parallel_r1.data.problems import Example, Problem
from megatron_parallel_r1.data.sampler import Int64, RowLocation, StreamedShuffle
from megatron_parallel_r1.errors import UserError

T = TypeVar("T", Problem, Example)
BadRows = Literal["refuse", "skip"]
Flags = NDArray[np.bool_]


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
        drops_repeats: drop rows that repeat a problem, and all copies of one whose copies disagree on the
            answer; otherwise both are only counted.
    """

    label: str
    tables: tuple[RowTable, ...]
    build: Callable[[Cells, str], T]
    drops_repeats: bool

    def survey(
        self, bad_rows: BadRows, limit: int | None, take: Callable[[RowLocation, T], None]
    ) -> tuple[RowAccount, frozenset[int]]:
        """Reads every row once and passes each usable one to `take`.

        Returns:
            The account, and the indices (from 0) of the items passed that must be dropped as repeats.

        Raises:
            UserError: a row is bad under `refuse`, or no row is usable.
        """
        seen, rows = SeenProblems(), 0
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
            seen.add(location, problem_of(item))
            take(location, item)
        if len(bad) == rows:
            raise UserError(f"{self.label}: no usable row{f'; {bad[0]}' if bad else ''}")
        repeats_N, disputed_N = seen.repeats()
        dropped_N = (repeats_N | disputed_N) & self.drops_repeats
        kept = int((~dropped_N).sum())
        if not kept:
            raise UserError(f"{self.label}: no usable row; all contradict one another about the answer")
        account = RowAccount(
            self.label,
            rows,
            kept,
            tuple(bad),
            int((repeats_N & ~disputed_N).sum()),
            int(disputed_N.sum()),
            self.drops_repeats,
            tuple(self.id_of(location) for location in seen.contradiction(disputed_N)),
        )
        return account, frozenset(np.flatnonzero(dropped_N).tolist())

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
        account, dropped = source.survey(
            bad_rows, limit, lambda location, _: usable[location[0]].append(location[1])
        )
        rows, first = [], 0
        for numbers in usable:
            rows_N = np.array(numbers, np.int64)
            rows.append(np.delete(rows_N, [i - first for i in dropped if first <= i < first + len(rows_N)]))
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


class SeenProblems:
    """Finds problems whose prompts differ at most in white space; holds 40 bytes for each."""

    def __init__(self) -> None:
        self._digests = bytearray()
        self._locations = array("q")

    def add(self, location: RowLocation, problem: Problem) -> None:
        """Adds the problem of a row."""
        words = " ".join(problem.prompt.split())
        if problem.context:
            words += repr(problem.context)
        # 16 bytes: two of 10^8 different problems collide with a probability below 10^-22.
        self._digests += hashlib.blake2b(words.encode(), digest_size=16).digest()
        self._digests += hashlib.blake2b(repr(problem.answers).encode(), digest_size=8).digest()
        self._locations.extend(location)

    def repeats(self) -> tuple[Flags, Flags]:
        """Returns for each row whether an earlier row has its problem, and whether rows of it disagree."""
        order_N, starts_N, answers_N = self._sorted()
        group_N = np.cumsum(starts_N) - 1
        firsts_G = answers_N[starts_N]
        disputed_G = np.bincount(group_N, answers_N != firsts_G[group_N], len(firsts_G)) > 0
        repeats_N, disputed_N = np.empty_like(starts_N), np.empty_like(starts_N)
        repeats_N[order_N] = ~starts_N
        disputed_N[order_N] = disputed_G[group_N]
        return repeats_N, disputed_N

    def contradiction(self, disputed_N: Flags) -> tuple[RowLocation, ...]:
        """Returns the location of the first row that another contradicts, and of that one; none without."""
        if not disputed_N.any():
            return ()
        digests_N3 = self._digests_N3()
        first = int(np.argmax(disputed_N))
        same_N = (digests_N3[:, :2] == digests_N3[first, :2]).all(axis=1)
        other = int(np.argmax(same_N & (digests_N3[:, 2] != digests_N3[first, 2])))
        at = self._locations
        return tuple((at[2 * index], at[2 * index + 1]) for index in (first, other))

    def _digests_N3(self) -> NDArray[np.uint64]:
        return np.frombuffer(bytes(self._digests), np.uint64).reshape(-1, 3)

    def _sorted(self) -> tuple[Int64, Flags, NDArray[np.uint64]]:
        """Returns the order by problem, in it the first row of each problem, and the answers' digests."""
        digests_N3 = self._digests_N3()
        order_N = np.lexsort((digests_N3[:, 0], digests_N3[:, 1]))  # stable: copies keep the order of rows
        sorted_N3 = digests_N3[order_N]
        starts_N = np.ones(len(order_N), bool)
        starts_N[1:] = (sorted_N3[1:, :2] != sorted_N3[:-1, :2]).any(axis=1)
        return order_N, starts_N, sorted_N3[:, 2]
