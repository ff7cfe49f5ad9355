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
    """Counts of rows; rows == kept + bad + repeated + disputed.

    Attributes:
        source: the file, folder or name on the Hub.
        rows: all rows read.
        kept: rows that became problems or examples.
        bad: rows skipped because a column was not usable.
        repeated: rows dropped because an earlier row has the same problem.
        disputed: rows dropped because rows with the same problem have different answers.
    """

    source: str
    rows: int
    kept: int
    bad: tuple[BadRow, ...]
    repeated: int
    disputed: int

    def __post_init__(self) -> None:
        assert self.rows == self.kept + len(self.bad) + self.repeated + self.disputed

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
