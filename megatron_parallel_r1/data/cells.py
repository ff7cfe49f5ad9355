"""Rows of a data set as they are read: tables of numbered rows, and readers of single columns."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any, Protocol, TypeVar

from megatron_parallel_r1.data.problems import ChatTurn
from megatron_parallel_r1.utils.latex import last_boxes

T = TypeVar("T")

Cells = Mapping[str, Any]
CellReader = Callable[[Cells], str]


class UnusableRow(ValueError):
    """The reason why a row cannot be used.

    Attributes:
        what: the kind of fault, which other rows share.
        detail: the part that is this row's own.
    """

    def __init__(self, what: str, detail: str = "") -> None:
        super().__init__(what + detail)
        self.what = what
        self.detail = detail


class BadCell(UnusableRow):
    """The reason why a column of a row cannot be used."""

    def __init__(self, column: str, what: str, detail: str = "") -> None:
        super().__init__(f"column {column!r}: {what}", detail)


# The number of a row, and its cells or the reason why they cannot be read.
NumberedRow = tuple[int, Cells | UnusableRow]


class RowTable(Protocol):
    """Rows in a fixed order, never all in memory: a file, or a data set on the Hub.

    Attributes:
        label: the name in messages, as the user wrote it.
        name: the short name, unique within a folder.
    """

    label: str
    name: str

    def rows(self) -> Iterator[NumberedRow]:
        """Yields every row; the numbers rise."""
        ...

    def pick(self, numbers: Sequence[int]) -> Iterator[NumberedRow]:
        """Yields the rows of rising `numbers`, all of which `rows` has yielded."""
        ...


def text(column: str, alias: str | None = None) -> CellReader:
    """Reads a column of text, which some copies of the data set call `alias`."""

    def read(row: Cells) -> str:
        name = alias if alias is not None and column not in row and alias in row else column
        return as_text(row.get(name), name)

    return read


def value(column: str) -> CellReader:
    """Reads an answer stored as text or as a number."""
    return lambda row: as_value(row.get(column), column)


def at_path(path: str, convert: Callable[[object, str], T]) -> Callable[[Cells], T]:
    """Reads a column or a value inside it: `reward_model.ground_truth`, `prompt.0.content`, `prompt.user`.

    A role selects the text of the last message of that role, `assistant` as `as_response` does. A column
    whose own name contains the dots takes precedence.
    """

    def read(row: Cells) -> T:
        if path in row:
            return convert(row[path], path)
        cell: object = row
        for step in path.split("."):
            if isinstance(cell, list) and step.isdigit() and int(step) < len(cell):
                cell = cell[int(step)]
            elif isinstance(cell, dict) and step in cell:
                cell = cell[step]
            elif isinstance(cell, list) and step == "assistant":
                cell = as_response(cell, path)
            elif isinstance(cell, list) and (turns := [t for t in _turns(cell, path) if t[0] == step]):
                cell = _content(turns[-1][1], path)
            else:
                raise BadCell(path, "missing", f"; the row has {', '.join(map(repr, row))}")
        return convert(cell, path)

    return read


def as_text(cell: object, column: str) -> str:
    """Returns non-blank text, stripped."""
    if cell is None:
        raise BadCell(column, "missing")
    if not isinstance(cell, str):
        raise BadCell(column, f"{type(cell).__name__} instead of text")
    if not cell.strip():
        raise BadCell(column, "blank")
    try:
        cell.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair; no tokenizer accepts it
        # Of CSV, bytes that are no text were read as these.
        is_byte = "\udc80" <= cell[error.start] <= "\udcff"
        what = "text that is not UTF-8" if is_byte else "a lone surrogate"
        raise BadCell(column, what, f", at character {error.start}") from None
    return cell.strip()


def as_question(cell: object, column: str) -> str:
    """Returns text as `as_text` does, or the user's last message of a conversation."""
    if not isinstance(cell, list):
        return as_text(cell, column)
    turns = _turns(cell, column)
    return _content(turns[_question(turns, column)][1], column)


def as_context(cell: object, column: str) -> tuple[ChatTurn, ...]:
    """Returns the messages before the user's last one, without blank system prompts; none of a text."""
    if not isinstance(cell, list):
        return ()
    turns = _turns(cell, column)
    return tuple(
        (role, _content(content, column))
        for role, content in turns[: _question(turns, column)]
        if role != "system" or (content.strip() if isinstance(content, str) else content)
    )


def as_response(cell: object, column: str) -> str:
    """Returns text as `as_text` does, or the assistant's last message after the user's last one."""
    if not isinstance(cell, list):
        return as_text(cell, column)
    turns = _turns(cell, column)
    roles = [role for role, _ in turns]
    if "assistant" not in roles:
        raise BadCell(column, "no message of the assistant")
    start = _question(turns, column) if "user" in roles else 0
    if "assistant" not in roles[start:]:
        raise BadCell(column, "no reply to the user's last message")
    return _content([content for role, content in turns if role == "assistant"][-1], column)


def _question(turns: list[tuple[str, Any]], column: str) -> int:
    """Returns the index of the user's last message."""
    last = max((index for index, (role, _) in enumerate(turns) if role == "user"), default=None)
    if last is None:
        raise BadCell(column, "no message of the user" if turns else "not a list of messages")
    return last


def _turns(cell: list[Any], column: str) -> list[tuple[str, Any]]:
    """Returns roles and contents of messages as OpenAI, verl or ShareGPT write them; without role: user."""
    turns = []
    for message in cell:
        if not isinstance(message, dict):
            raise BadCell(column, "not a list of messages")
        role = message.get("role", message.get("from")) or "user"
        if not isinstance(role, str):
            raise BadCell(column, f"a role that is a {type(role).__name__}")
        content = message.get("content", message.get("value"))
        turns.append(({"human": "user", "gpt": "assistant"}.get(role, role), content))
    return turns


def _content(content: object, column: str) -> str:
    if isinstance(content, list) and all(isinstance(part, dict) and "text" in part for part in content):
        content = "\n".join(as_text(part["text"], column) for part in content)
    return as_text(content, column)


_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def as_answers(cell: object, column: str) -> tuple[str, ...]:
    """Returns the right answers: one text or number, or a list of them, of which any counts.

    A list may also be written as JSON text, `["1/2", "0.5"]`. Of a worked answer the final answer is read:
    the last box, or the last line `#### 1,234` as in GSM8K, without thousands separators.
    """
    if isinstance(cell, str) and cell.lstrip().startswith('["'):
        try:
            cell = JSON.decode(cell)
        except ValueError:
            return (as_text(cell, column),)
        except RecursionError:
            raise BadCell(column, "nested too deep") from None
    if isinstance(cell, list):
        if not cell:
            raise BadCell(column, "an empty list")
        return tuple(dict.fromkeys(_final_answer(item, column) for item in cell))
    return (_final_answer(cell, column),)


def _final_answer(cell: object, column: str) -> str:
    text = as_value(cell, column)
    if "\\boxed" in text and (box := boxed_answer(text, column)) is not None:
        return box
    return text if (marked := after_mark(text, column)) is None else marked


def boxed_answer(text: str, column: str) -> str | None:
    """Returns the content of the last box and of those that `and` joins to it; None without one."""
    box = last_boxes(text, alternatives=False)
    closed = f"{text} ?{'}' * text.count('{')}"
    if box != last_boxes(closed, alternatives=False):
        raise BadCell(column, r"a \boxed{ that is never closed")
    return box


def after_mark(text: str, column: str) -> str | None:
    """Returns the value after the last `####`, without thousands separators; None if it is several lines."""
    _, mark, after = text.rpartition("####")
    if mark and not after.strip():
        raise BadCell(column, "no value after ####")
    return _THOUSANDS.sub("", after.strip()) if mark and "\n" not in after.strip() else None


def as_value(cell: object, column: str) -> str:
    """Returns text as `as_text` does, or a number in decimal notation."""
    if isinstance(cell, bool) or not isinstance(cell, int | float | Decimal):
        return as_text(cell, column)
    if not isinstance(cell, int) and not math.isfinite(cell):
        raise BadCell(column, "a number that is not finite")
    if isinstance(cell, WrittenFloat) and not cell and re.match(r"[-.0]*[1-9]", cell.text):
        raise BadCell(column, "a number too close to 0")
    return decimal_text(cell)


class WrittenFloat(float):
    """A float that remembers the text it was read from."""

    __slots__ = ("text",)
    text: str

    def __new__(cls, text: str) -> WrittenFloat:
        number = super().__new__(cls, text)
        number.text = text
        return number


JSON = json.JSONDecoder(parse_float=WrittenFloat)


def decimal_text(number: int | float | Decimal) -> str:
    """Returns a finite number without an exponent and without zeros that end a fraction.

    A float has the shortest digits that give it back: 1e-05 is 0.00001, 27.0 is 27.
    """
    if isinstance(number, int):
        return str(number)
    written = number.text if isinstance(number, WrittenFloat) else str(number)
    text = format(Decimal(written), "f") if number else "0"
    return text.rstrip("0").rstrip(".") if "." in text else text
