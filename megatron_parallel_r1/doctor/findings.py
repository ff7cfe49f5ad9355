"""What the checks found, on all ranks, as one table."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_parallel_r1.errors import one_line
from megatron_parallel_r1.utils.tables import Column, Table

Level = Literal["ok", "note", "fault"]
# The most that a table shows of another library's error.
ERROR_CHARACTERS = 300


@dataclass(frozen=True, slots=True)
class Finding:
    """
    Attributes:
        subject: what was checked.
        found: what there is.
        level: `note`: a run works, but slower or with less; `fault`: a run fails.
        advice: what to do about a note or a fault.
    """

    subject: str
    found: str
    level: Level = "ok"
    advice: str = ""


def examine(subject: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    """Runs a check. An error of it is a fault: a run would meet it too."""
    started = time.monotonic()
    try:
        return check()
    except Exception as error:  # whatever it is, the other checks go on
        seconds = time.monotonic() - started
        return [Finding(subject, f"{one_line(error, ERROR_CHARACTERS)} (after {seconds:.0f} s)", "fault")]


@dataclass(frozen=True, slots=True)
class FindingRow:
    """A finding, and which ranks have it."""

    finding: Finding
    ranks: tuple[int, ...]


def merge(by_rank: Sequence[Iterable[Finding]]) -> list[FindingRow]:
    """Equal findings of several ranks become one row; rows keep the order in which checks ran."""
    ranks: dict[Finding, list[int]] = {}
    for rank, findings in enumerate(by_rank):
        for finding in findings:
            ranks.setdefault(finding, []).append(rank)
    subjects = list(dict.fromkeys(finding.subject for finding in ranks))
    rows = [FindingRow(finding, tuple(found)) for finding, found in ranks.items()]
    return sorted(rows, key=lambda row: subjects.index(row.finding.subject))


def rank_text(ranks: Sequence[int]) -> str:
    """`0-3, 6` of 0, 1, 2, 3, 6."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def findings_table(rows: Sequence[FindingRow]) -> Table:
    """The table of all findings, faults and notes with what to do."""
    columns: tuple[Column[FindingRow], ...] = (
        Column("check", "", lambda row: row.finding.subject, is_text=True),
        Column("ranks", "", lambda row: rank_text(row.ranks), is_text=True),
        Column("", "", lambda row: row.finding.level.upper().replace("OK", "ok"), is_text=True),
        Column(
            "found",
            "",
            lambda row: "; ".join(filter(None, (row.finding.found, row.finding.advice))),
            is_text=True,
        ),
    )
    return Table.of("doctor", "What the first hour of a run would find out.", columns, rows)


def verdict(rows: Sequence[FindingRow]) -> str:
    """One line: whether runs will work here, and what is in the way."""
    faults, notes = (
        list(dict.fromkeys(row.finding.subject for row in rows if row.finding.level == level))
        for level in ("fault", "note")
    )
    if faults:
        return f"not ready: {', '.join(faults)}"
    return f"ready{', with notes on ' + ', '.join(notes) if notes else ''}"
