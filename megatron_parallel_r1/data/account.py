"""What became of every row of a data set, and the table that says it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_NAMED = 8


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that was skipped.

    Attributes:
        row: its number from 0; in JSON Lines, its line's.
        what: what was wrong, in words that other rows share.
        detail: what is this row's own.
        file: in a folder of several.
    """

    row: int
    what: str
    detail: str = ""
    file: str | None = None

    def __str__(self) -> str:
        return f"row {self.row} (from 0){f' of {self.file}' if self.file else ''}, {self.what}{self.detail}"


@dataclass(frozen=True, slots=True)
class Account:
    """rows == kept + bad + repeated + disputed.

    Attributes:
        source: the file, the folder or the name on the Hub.
        rows: read in all.
        kept: problems or examples that they gave.
        bad: skipped since a column was not usable.
        repeated: dropped since an earlier row has the same problem.
        disputed: dropped since rows with the same problem have different answers.
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
        """The bad rows by reason, the most frequent first."""
        reasons: dict[str, list[BadRow]] = {}
        for bad in self.bad:
            reasons.setdefault(bad.what, []).append(bad)
        return dict(sorted(reasons.items(), key=lambda reason: -len(reason[1])))


def account_table(accounts: Sequence[Account]) -> str:
    """A Markdown table: rows read, kept, and for each reason how many were dropped and the first of them."""
    lines = ["| source | read | kept | dropped | why | rows, from 0 |", "|---|---:|---:|---:|---|---|"]
    for account in accounts:
        reasons = [(len(bad), what, _first_of(bad)) for what, bad in account.dropped().items()]
        reasons.append((account.repeated, "repeats an earlier problem", ""))
        reasons.append((account.disputed, "copies of the problem disagree on the answer", ""))
        told = [reason for reason in reasons if reason[0]] or [(0, "", "")]
        for index, (count, why, which) in enumerate(told):
            head = (account.source, account.rows, account.kept) if index == 0 else ("", "", "")
            cells = (*head, count, why, which)
            lines.append(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _first_of(bad: Sequence[BadRow]) -> str:
    shown = [f"{row.file}:{row.row}" if row.file else str(row.row) for row in bad[:_NAMED]]
    return ", ".join(shown) + (", …" if len(bad) > _NAMED else "")
