"""The folder that an evaluation writes to: its layout, and in one line why it cannot be written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_parallel_r1.errors import UserError

DEFAULT_OUT = Path("runs/eval")
# The files of records below `records_under`, one for each replica.
RECORDS = "copy*.jsonl"


def records_under(out: Path) -> Path:
    """The folder of all records."""
    return out / "records"


def check_out(folder: Path) -> None:
    """Checks, before a model is loaded and without creating anything, that `folder` can be written.

    Raises:
        UserError: it cannot.
    """
    existing = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not existing.is_dir():
        raise UserError(f"--out {folder}: {existing} is no folder; give another")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--out {folder}: {existing} may not be written; give another")


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns errors of writing into one line.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    try:
        yield
    except OSError as error:
        where, why = error.filename or folder, error.strerror or error
        raise UserError(f"{where}: {why}; free some space or give another --out, then start again") from None
