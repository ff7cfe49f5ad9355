"""What a table of rows is to the readers: a file, or a data set on the Hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

Cells = Mapping[str, Any]


class Unusable(ValueError):
    """Why a row is of no use.

    Attributes:
        what: in words that other rows share.
        detail: what is this row's own.
    """

    def __init__(self, what: str, detail: str = "") -> None:
        super().__init__(what + detail)
        self.what = what
        self.detail = detail


# In place of the cells of a row that has none to read: why.
Numbered = tuple[int, Cells | Unusable]


class Shard(Protocol):
    """Rows in a fixed order, never all in memory.

    Attributes:
        label: names it in messages, as the user gave it.
        name: its short name, apart from its siblings' in a folder.
    """

    label: str
    name: str

    def rows(self) -> Iterator[Numbered]:
        """Every row with its number, which rises."""
        ...

    def pick(self, numbers: Sequence[int]) -> Iterator[Numbered]:
        """The rows of rising `numbers`, all of them numbers that `rows` gave."""
        ...
