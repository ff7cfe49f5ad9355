"""JSON Lines files that survive kills and resumes.

The writer appends each record with one system call, so a reader sees whole records and at most one torn
line, the last. A run that resumes at step k first drops the records of later steps.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.utils.files import write_atomically

JsonRecord = dict[str, Any]


class JsonlWriter:
    """Appends records to a file; creates the file and its folder, and drops a torn last line.

    Args:
        path: the file.
        through: drop existing records of later steps: a resumed run passes the step of its checkpoint, a
            new run 0. None keeps all records.
    """

    def __init__(self, path: Path, through: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _trim(path, through)
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends a record; writes NaN and infinities as null.

        Raises:
            OSError: the disk has no room for the whole line.
        """
        line = (json.dumps(jsonable(record), ensure_ascii=False, allow_nan=False) + "\n").encode(
            "utf-8", errors="replace"
        )
        if os.write(self._file, line) != len(line):
            raise OSError(f"{self._path}: only a part of a record could be written")

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> JsonlWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_jsonl(path: Path, missing_ok: bool = False) -> list[dict[str, Any]]:
    """Reads all records of a file, without a torn last line.

    Args:
        missing_ok: read a file that does not exist as one without records.

    Raises:
        UserError: the file does not exist, or a line is not a JSON object.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        if missing_ok:
            return []
        raise UserError(f"{path}: no such file") from None
    lines.pop()
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error}); repair or delete it") from None
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number}: expected a JSON object; repair or delete it")
        records.append(record)
    return records


def jsonable(value: Any) -> Any:
    """Converts to plain JSON values: unwraps tensor and numpy scalars, maps NaN and infinities to None."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if not isinstance(value, str | bool | int | float) and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _trim(path: Path, through: int | None) -> None:
    old = path.read_bytes()
    lines = old.split(b"\n")[:-1]
    if through is not None:
        lines = [line for line in lines if line.strip() and _step(path, line) <= through]
    new = b"".join(line + b"\n" for line in lines)
    if new != old:
        write_atomically(path, new)


def _step(path: Path, line: bytes) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path}: a line has no step: {line[:80]!r}; repair or delete it") from None
