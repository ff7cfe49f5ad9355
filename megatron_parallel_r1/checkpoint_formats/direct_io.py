"""Files that are read or written past the page cache, where their file system lets them."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from pathlib import Path
from types import TracebackType

import numpy as np

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


BLOCK = 2**22
MOST = 2**30  # bytes a call; not every system takes more than 2 GiB


class FileBytes:
    """An open file; a context manager.

    Args:
        once: whether nobody will read the same soon again.

    Raises:
        OSError: here and in `read`: the file cannot be read.
    """

    def __init__(self, file: Path, once: bool = False) -> None:
        if once:
            self._block_B = np.frombuffer(aligned_memory(BLOCK), dtype=np.uint8)
            self._descriptor = open_direct(file, os.O_RDONLY)
        else:
            self._descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)

    def __enter__(self) -> FileBytes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def read(self, begin: int, out_B: np.ndarray) -> int:
        """Fills `out_B`, uint8, from the file's byte `begin` on; returns how many there were."""
        if is_direct(self._descriptor):
            try:
                return self._read_direct(begin, out_B)
            except OSError as error:
                give_up(self._descriptor, error)
        done = 0
        while done < len(out_B):
            count = os.preadv(self._descriptor, [out_B[done : done + MOST]], begin + done)
            if not count:
                break
            done += count
        return done

    def _read_direct(self, begin: int, out_B: np.ndarray) -> int:
        done, ahead = 0, begin % ALIGNED
        while done < len(out_B):
            room_B = self._block_B[: rounded_up(ahead + len(out_B) - done)]
            count = os.preadv(self._descriptor, [room_B], begin + done - ahead)
            some_B = room_B[ahead:count][: len(out_B) - done]
            if not len(some_B):
                break
            out_B[done : done + len(some_B)] = some_B
            done += len(some_B)
            ahead = (begin + done) % ALIGNED
        return done
