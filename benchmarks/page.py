"""Writes the sections of `docs/performance.md`, one per benchmark."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from megatron_parallel_r1.utils.tables import markdown_table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"


@dataclass(frozen=True, slots=True)
class Table:
    """A titled table with an optional note below it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def markdown(self) -> str:
        table = markdown_table(self.columns, self.rows)
        return "\n".join((f"### {self.title}", "", table, "", self.note, ""))


def add_write_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--write", action="store_true", help="also write the tables to docs/performance.md")


def publish(name: str, tables: Sequence[Table], machine: str, write: bool, page: Path = PAGE) -> None:
    """Prints the tables of benchmark `name`; with `write`, also replaces its section of the page.

    Args:
        machine: short description of the hardware.
    """
    text = f"Measured on {date.today()}, {machine}.\n\n" + "\n".join(table.markdown() for table in tables)
    print(text, flush=True)
    if write:
        replace_section(page, name, text)


def replace_section(page: Path, name: str, text: str) -> None:
    """Replaces the text between the markers of a section; appends the section if the page has none."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    whole = page.read_text() if page.exists() else "# Performance\n"
    section = f"{begin}\n{text.strip()}\n{end}"
    if begin in whole and end in whole:
        before, rest = whole.split(begin, 1)
        whole = before + section + rest.split(end, 1)[1]
    else:
        whole = f"{whole.rstrip()}\n\n{section}\n"
    page.write_text(whole)
