"""Tables, defined once and written as Markdown, for a terminal, or by an HTML template."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from rich.table import Table as RichTable
from rich.text import Text

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Column(Generic[T]):
    """A heading, what it means, and a function from an item to its cell; numbers are aligned right."""

    title: str
    hint: str
    cell: Callable[[T], str]
    is_text: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A title, an explanation in a sentence or two, and cells as text."""

    title: str
    lead: str
    columns: tuple[Column[Any], ...]
    rows: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, title: str, lead: str, columns: tuple[Column[T], ...], items: Iterable[T]) -> Table:
        """A row for each item."""
        return cls(title, lead, columns, tuple(tuple(c.cell(item) for c in columns) for item in items))

    def markdown(self) -> str:
        """The table without its title; ends without a newline."""
        align = "".join("l" if column.is_text else "r" for column in self.columns)
        return markdown_table([column.title for column in self.columns], self.rows, align)

    def terminal(self) -> RichTable:
        """The table for a console; markup in a cell is shown as text."""
        table = RichTable(title=self.title, title_style="bold", title_justify="left")
        for column in self.columns:
            table.add_column(column.title, justify="left" if column.is_text else "right")
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[object]], align: str = "") -> str:
    """A Markdown table; ends without a newline.

    Args:
        align: a letter for each column, `l` or `r`; default: all left.
    """
    rules = ["---:" if letter == "r" else "---" for letter in align or "l" * len(titles)]
    return "\n".join(f"| {' | '.join(map(_escape, line))} |" for line in (titles, rules, *rows))


def _escape(cell: object) -> str:
    return str(cell).replace("|", "\\|").replace("\n", " ")
