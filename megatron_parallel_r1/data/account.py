"""Counts of a data set's rows, kept and dropped, and their table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_parallel_r1.utils.tables import markdown_table

_LISTED_ROWS = 8


@dataclass(frozen=True, slots=True)
class BadRow:
    """A skipped row.

    Attributes:
        row: the number of the row, from 0; in JSON Lines, that of its line.
        what: the kind of fault, which other rows share.
        detail: the part that is this row's own.
        file: the file's name, in a folder of several.
    """

    row: int
    what: str
    detail: str = ""
    file: str | None = None

    def __str__(self) -> str:
        return f"row {self.row} (from 0){f' of {self.file}' if self.file else ''}, {self.what}{self.detail}"


@dataclass(frozen=True, slots=True)
class RowAccount:
    """Counts of rows; rows == kept + bad + repeated + disputed, the last two only if `drops_repeats`.

    Attributes:
        source: the file, folder or name on the Hub.
        rows: all rows read.
        kept: rows that became problems or examples.
        bad: rows skipped because a column was not usable.
        repeated: rows whose problem an earlier row has, with the same answers.
        disputed: rows whose problem another row has with different answers.
        drops_repeats: whether both are dropped.
        contradiction: two rows that disagree, by their ids.
    """

    source: str
    rows: int
    kept: int
    bad: tuple[BadRow, ...]
    repeated: int
    disputed: int
    drops_repeats: bool = True
    contradiction: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        repeats = self.repeated + self.disputed if self.drops_repeats else 0
        assert self.rows == self.kept + len(self.bad) + repeats

    def notes(self) -> list[str]:
        """Returns a line for repeats and one for contradictions, if there are any."""
        advice = "left out" if self.drops_repeats else "kept; drop_repeats=true leaves them out"
        notes = []
        if self.repeated:
            notes.append(
                f"{self.source}: {self.repeated:,} of {self.rows:,} rows repeat an earlier problem, {advice}"
            )
        if self.disputed:
            notes.append(
                f"{self.source}: {self.disputed:,} of {self.rows:,} rows contradict another row about the "
                f"right answer of a problem, such as rows {' and '.join(self.contradiction)}, {advice}"
            )
        return notes

    def dropped(self) -> dict[str, list[BadRow]]:
        """Groups the bad rows by reason, the most frequent first."""
        reasons: dict[str, list[BadRow]] = {}
        for bad in self.bad:
            reasons.setdefault(bad.what, []).append(bad)
        return dict(sorted(reasons.items(), key=lambda reason: -len(reason[1])))


def account_table(accounts: Sequence[RowAccount]) -> str:
    """Formats a Markdown table: rows read, kept, and dropped, with reasons and the first dropped rows."""
    rows: list[tuple[object, ...]] = []
    for account in accounts:
        reasons = [(len(bad), what, _list_rows(bad)) for what, bad in account.dropped().items()]
        if account.drops_repeats:
            reasons.append((account.repeated, "repeats an earlier problem", ""))
            reasons.append((account.disputed, "copies of the problem disagree on the answer", ""))
        for index, reason in enumerate([r for r in reasons if r[0]] or [(0, "", "")]):
            head = (account.source, account.rows, account.kept) if index == 0 else ("", "", "")
            rows.append((*head, *reason))
    titles = ("source", "read", "kept", "dropped", "why", "rows, from 0")
    return markdown_table(titles, rows, "lrrrll") + "\n"


def _list_rows(bad: Sequence[BadRow]) -> str:
    names = [f"{row.file}:{row.row}" if row.file else str(row.row) for row in bad[:_LISTED_ROWS]]
    return ", ".join(names) + (", …" if len(bad) > _LISTED_ROWS else "")
