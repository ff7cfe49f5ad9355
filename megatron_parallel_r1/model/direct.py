"""Files that are read or written past the page cache, where their file system lets them."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from pathlib import Path

# What a file system may want direct reads and writes to begin at and to be a multiple of.
ALIGNED = 4096
DIRECT = getattr(os, "O_DIRECT", 0)


def open_direct(file: Path, flags: int) -> int:
    """A descriptor; through the page cache if the file system has no other way.

    Raises:
        OSError: the file cannot be opened at all.
    """
    try:
        return os.open(file, flags | os.O_CLOEXEC | DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(file, flags | os.O_CLOEXEC, 0o666)


def is_direct(descriptor: int) -> bool:
    """Whether reads and writes go past the page cache."""
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & DIRECT)


def give_up(descriptor: int, error: OSError) -> None:
    """Goes through the page cache from now on, because of what a direct read or write came to.

    Raises:
        OSError: `error`, which has another reason.
    """
    if error.errno != errno.EINVAL or not is_direct(descriptor):
        raise error
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~DIRECT)


def rounded_up(count: int) -> int:
    """To a multiple of `ALIGNED`."""
    return -(-count // ALIGNED) * ALIGNED


def aligned_memory(size: int) -> mmap.mmap:
    """Zeros that begin where a page does. Private: Linux gives shared memory small pages by default."""
    return mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
