"""Atomic, durable file writes, and digests of files."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_parallel_r1.errors import UserError

CHUNK = 2**22  # bytes read at a time


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file in one step: readers see the old content or the new, never a part of it.

    Text is encoded as UTF-8. See `atomic_path` for the guarantees.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it to `path` when the block succeeds.

    Flushes the file to disk before the rename and the folder after it, so that the guarantee survives a
    power loss. The temporary name is unique: processes may write the same path at the same time, and the
    last one wins. If the block fails, deletes the temporary file and leaves `path` unchanged.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        yield temporary
        fsync_path(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def check_writable(folder: Path) -> None:
    """Checks that a folder can be written, or created; writes nothing.

    Raises:
        UserError: it cannot.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"{folder}: {existing} is not a folder; choose another")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: {existing} cannot be written by this user; choose another")


def fsync_path(path: Path) -> None:
    """Flushes a file's bytes, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class FileDigest:
    """A file's size in bytes and its SHA-256 in hex."""

    size: int
    sha256: str


def file_digest(file: Path) -> FileDigest:
    """Computes the digest of a file."""
    digest, size = hashlib.sha256(), 0
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return FileDigest(size, digest.hexdigest())
