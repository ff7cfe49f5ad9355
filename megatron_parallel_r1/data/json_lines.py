"""JSON Lines, read a line at a time: a broken line costs one row and not the file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_parallel_r1.data.shard import Numbered, Unusable

_EVERY = 1024
_BOM = b"\xef\xbb\xbf"


class JsonlTable:
    """A file with a JSON object a line. A row's number is its line's, from 0; blank lines are no rows.

    The byte offset of every 1024th line is remembered when `rows` passes it, for `pick` to begin at.
    """

    def __init__(self, path: Path) -> None:
        self.label = str(path)
        self.name = path.name
        self._path = path
        self._offsets = [0]

    def rows(self) -> Iterator[Numbered]:
        with self._path.open("rb") as file:
            offset = 0
            for number, line in enumerate(file):
                if number == len(self._offsets) * _EVERY:
                    self._offsets.append(offset)
                offset += len(line)
                if number == 0:
                    line = line.removeprefix(_BOM)
                if line.strip():
                    yield number, _object(line)

    def pick(self, numbers: Sequence[int]) -> Iterator[Numbered]:
        with self._path.open("rb") as file:
            at = 0  # the line that `file` stands before
            for number in numbers:
                mark = min(number // _EVERY, len(self._offsets) - 1)
                if mark * _EVERY > at:
                    file.seek(self._offsets[mark])
                    at = mark * _EVERY
                while at <= number:
                    line = file.readline()
                    at += 1
                yield number, _object(line.removeprefix(_BOM) if number == 0 else line)


def _object(line: bytes) -> dict[str, Any] | Unusable:
    try:
        cells = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return Unusable("text that is not UTF-8", f", at byte {error.start} of the line")
    except json.JSONDecodeError as error:
        return Unusable("not JSON", f", {error.msg} at character {error.pos} of the line")
    except ValueError:  # Python's own limit for text that becomes a whole number
        return Unusable("not JSON", ", a number of too many digits")
    except RecursionError:
        return Unusable("not JSON", ", nested too deep")
    if not isinstance(cells, dict):
        return Unusable(f"a {type(cells).__name__}, not an object with columns")
    return cells
