"""Tables of Markdown, and the section of a document that holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

BEGIN, END = "<!-- gpu: begin, written by benchmarks/gpu/run.py -->", "<!-- gpu: end -->"


@dataclass(frozen=True, slots=True)
class Table:
    """A heading, names of columns, rows of cells."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join((f"### {self.title}", "", *(f"| {' | '.join(line)} |" for line in lines), ""))


def replace_section(document: Path, text: str) -> None:
    """Puts `text` between the document's marks; without them, or without the document, at its end."""
    whole = document.read_text() if document.exists() else "# Performance\n"
    section = f"{BEGIN}\n{text.strip()}\n{END}"
    if BEGIN in whole and END in whole:
        before, rest = whole.split(BEGIN, 1)
        whole = before + section + rest.split(END, 1)[1]
    else:
        whole = f"{whole.rstrip()}\n\n{section}\n"
    document.write_text(whole)
