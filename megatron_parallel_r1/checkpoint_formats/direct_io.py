"""Reads and writes that bypass the page cache (O_DIRECT), where the file system supports it."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from pathlib import Path
from types import TracebackType

import numpy as np

# The alignment and granularity that a file system may require of direct reads and writes.
ALIGNED = 4096
DIRECT = getattr(os, "O_DIRECT", 0)


def open_direct(file: Path, flags: int) -> int:
    """Opens a file directly, or through the page cache if the file system has no direct I/O.

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
    """Returns whether reads and writes bypass the page cache."""
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & DIRECT)


def disable_direct(descriptor: int, error: OSError) -> None:
    """Falls back to the page cache after a direct read or write was refused.

    Raises:
        OSError: `error`, if it has another cause.
    """
    if error.errno != errno.EINVAL or not is_direct(descriptor):
        raise error
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~DIRECT)


def round_up(count: int) -> int:
    """Rounds up to a multiple of `ALIGNED`."""
    return -(-count // ALIGNED) * ALIGNED


def aligned_memory(size: int) -> mmap.mmap:
    """Returns page-aligned zeros. Private, because Linux gives shared memory small pages by default."""
    return mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


BLOCK = 2**22
MAX_READ = 2**30  # bytes per call; not every system takes more than 2 GiB


class FileBytes:
    """An open file; a context manager.

    Args:
        once: read directly, because nobody will read the same bytes again soon.

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
        """Fills `out_B`, uint8, from the file's byte `begin` on; returns the number of bytes read."""
        if is_direct(self._descriptor):
            try:
                return self._read_direct(begin, out_B)
            except OSError as error:
                disable_direct(self._descriptor, error)
        done = 0
        while done < len(out_B):
            count = os.preadv(self._descriptor, [out_B[done : done + MAX_READ]], begin + done)
            if not count:
                break
            done += count
        return done

    def _read_direct(self, begin: int, out_B: np.ndarray) -> int:
        done, skip = 0, begin % ALIGNED
        while done < len(out_B):
            block_B = self._block_B[: round_up(skip + len(out_B) - done)]
            count = os.preadv(self._descriptor, [block_B], begin + done - skip)
            data_B = block_B[skip:count][: len(out_B) - done]
            if not len(data_B):
                break
            out_B[done : done + len(data_B)] = data_B
            done += len(data_B)
            skip = (begin + done) % ALIGNED
        return done
