"""A data set opened: its rows, what each becomes, and which of them are of use."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import Generic, Literal, TypeVar

import numpy as np

from megatron_parallel_r1.data.account import Account, BadRow
from megatron_parallel_r1.data.problems import Example, Problem
from megatron_parallel_r1.data.shard import Cells, Shard, Unusable
from megatron_parallel_r1.data.stream import Int64, Place, StreamedShuffle
from megatron_parallel_r1.errors import UserError

T = TypeVar("T", Problem, Example)
BadRows = Literal["refuse", "skip"]


def problem_of(item: Problem | Example) -> Problem:
    """The problem itself, or that of a worked example."""
    return item.problem if isinstance(item, Example) else item


@dataclass(frozen=True, slots=True, eq=False)
class Source(Generic[T]):
    """A data set and how to read it.

    Attributes:
        where: it is, for messages.
        shards: its files in order.
        make: an item of a row's cells and its id; raises `Unusable`.
        repeats: whether rows may repeat a problem, so that repeats go.
    """

    where: str
    shards: tuple[Shard, ...]
    make: Callable[[Cells, str], T]
    repeats: bool

    def survey(
        self, bad_rows: BadRows, limit: int | None, take: Callable[[Place, T], None]
    ) -> tuple[Account, frozenset[int]]:
        """Goes through the rows once, and hands each good one that repeats no other to `take`.

        Returns:
            The account, and which of the items taken, counted from 0, must go since they are disputed.

        Raises:
            UserError: a bad row under `refuse`, no good row.
        """
        seen, rows, taken = Repeats(), 0, 0
        bad: list[BadRow] = []
        for place, cells in islice(self._rows(), limit):
            rows += 1
            try:
                item = self._item(place, cells)
            except Unusable as error:
                bad.append(self._bad_row(place, error))
                if bad_rows == "refuse":
                    raise UserError(
                        f"{self.where}: {bad[0]}; mend it, or skip such rows with bad_rows=skip"
                    ) from None
                continue
            if not self.repeats or seen.is_new(problem_of(item)):
                take(place, item)
                taken += 1
        if not taken:
            raise UserError(f"{self.where}: no usable row{f'; {bad[0]}' if bad else ''}")
        disputed = seen.disputed()
        return Account(self.where, rows, taken - len(disputed), tuple(bad), *seen.counts()), disputed

    def load(self, places: Sequence[Place]) -> Iterator[T]:
        """The items of rising places that a survey found good.

        Raises:
            UserError: a file is no longer what it was then.
        """
        for shard, here in groupby(places, key=lambda place: place[0]):
            yield from self.load_from(shard, [row for _, row in here])

    def load_from(self, shard: int, rows: Sequence[int]) -> Iterator[T]:
        """As `load`, of one file."""
        count = 0
        for row, cells in self.shards[shard].pick(rows):
            try:
                yield self._item((shard, row), cells)
            except Unusable as error:
                raise self._changed(shard, str(error)) from None
            count += 1
        if count < len(rows):
            raise self._changed(shard, f"{len(rows) - count} rows are gone")

    def id_of(self, place: Place) -> str:
        """The number of a row, behind the name of its file if there are several."""
        shard, row = place
        return f"{self.shards[shard].name}:{row}" if len(self.shards) > 1 else str(row)

    def _rows(self) -> Iterator[tuple[Place, Cells | Unusable]]:
        for index, shard in enumerate(self.shards):
            for row, cells in shard.rows():
                yield (index, row), cells

    def _item(self, place: Place, cells: Cells | Unusable) -> T:
        if isinstance(cells, Unusable):
            raise cells
        return self.make(cells, self.id_of(place))

    def _bad_row(self, place: Place, error: Unusable) -> BadRow:
        shard, row = place
        file = self.shards[shard].name if len(self.shards) > 1 else None
        return BadRow(row, error.what, error.detail, file)

    def _changed(self, shard: int, what: str) -> UserError:
        label = self.shards[shard].label
        return UserError(f"{label}: changed while it was in use ({what}); put it back, or start anew")


@dataclass(frozen=True, slots=True, eq=False)
class Streamed(Generic[T]):
    """A data set of any size: which of its rows are of use is known, the rows stay in their files.

    Attributes:
        account: of all rows.
        rows: of each shard, the numbers of the rows to use, rising: 8 bytes a row.
        buffer: items in memory at most when it is shuffled.
    """

    source: Source[T]
    account: Account
    rows: tuple[Int64, ...]
    buffer: int

    @classmethod
    def survey(cls, source: Source[T], bad_rows: BadRows, limit: int | None, buffer: int) -> Streamed[T]:
        """Reads every row once, and keeps none. Raises as `Source.survey`."""
        found = [array("q") for _ in source.shards]
        account, disputed = source.survey(bad_rows, limit, lambda place, _: found[place[0]].append(place[1]))
        rows, first = [], 0
        for numbers in found:
            rows_N = np.array(numbers, np.int64)
            rows.append(np.delete(rows_N, [i - first for i in disputed if first <= i < first + len(rows_N)]))
            first += len(rows_N)
        return cls(source, account, tuple(rows), buffer)

    def __len__(self) -> int:
        return sum(map(len, self.rows))

    def in_order(self) -> Iterator[T]:
        """Every item once, as the files have them."""
        for shard, rows_N in enumerate(self.rows):
            yield from self.source.load_from(shard, rows_N)

    def without(self, ids: Collection[str]) -> Streamed[T]:
        """The same but for the items of these ids."""
        rows = []
        for shard, rows_N in enumerate(self.rows):
            stays_N = np.array([self.source.id_of((shard, row)) not in ids for row in rows_N], bool)
            rows.append(rows_N[stays_N])
        return replace(self, rows=tuple(rows))

    def shuffled(self, seed: int) -> StreamedShuffle[T]:
        """An endless order, for `ProblemStream`."""
        return StreamedShuffle(self.rows, self.source.load, self.buffer, seed)


@dataclass(slots=True)
class _Copies:
    first: int
    answers: tuple[str, ...]
    count: int = 1
    agree: bool = True


class Repeats:
    """Problems count as the same if their prompts differ in white space at most."""

    def __init__(self) -> None:
        self._copies: dict[bytes, _Copies] = {}

    def is_new(self, problem: Problem) -> bool:
        """Whether no problem before was the same; the new ones are numbered from 0."""
        words = " ".join(problem.prompt.split())
        # 16 bytes: two of 10^8 different problems collide with a chance below 10^-22.
        key = hashlib.blake2b(words.encode(), digest_size=16).digest()
        copies = self._copies.get(key)
        if copies is None:
            self._copies[key] = _Copies(len(self._copies), problem.answers)
            return True
        copies.count += 1
        copies.agree &= copies.answers == problem.answers
        return False

    def disputed(self) -> frozenset[int]:
        """Numbers of the new problems some copy of which has another answer."""
        return frozenset(copies.first for copies in self._copies.values() if not copies.agree)

    def counts(self) -> tuple[int, int]:
        """Rows that repeat a problem all copies of which agree; rows of problems whose copies do not."""
        repeated = sum(copies.count - 1 for copies in self._copies.values() if copies.agree)
        return repeated, sum(copies.count for copies in self._copies.values() if not copies.agree)
