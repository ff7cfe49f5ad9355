"""The folder that an evaluation writes to: its layout, and in one line why it cannot be written.

<out>/records/<setup>/copy<n>.jsonl   a record a line      <out>/<name>.md, .html, .json   tables

Imports nothing heavy: a job's bookkeeping counts the records.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_parallel_r1.errors import UserError

USUAL = Path("runs/eval")
RECORDS = "copy*.jsonl"


def records_under(out: Path) -> Path:
    """The folder of all records."""
    return out / "records"


def check_out(folder: Path) -> None:
    """Whether `folder` can be written, or made: known before a model is loaded, and nothing is made yet.

    Raises:
        UserError: it cannot.
    """
    there = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not there.is_dir():
        raise UserError(f"--out {folder}: {there} is no folder; give another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--out {folder}: {there} may not be written; give another")


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Around what writes there.

    Raises:
        UserError: it cannot be written, or the disk is full.
    """
    try:
        yield
    except OSError as error:
        where, why = error.filename or folder, error.strerror or error
        raise UserError(f"{where}: {why}; mend that and start again, or give another --out") from None
