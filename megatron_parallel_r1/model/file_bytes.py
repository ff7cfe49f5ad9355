"""Bytes of a file into memory, on request past the page cache: what is read once need not be kept there.

Past it, the kernel need neither copy them nor look for pages to hold them.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from pathlib import Path
from types import TracebackType

import numpy as np

BLOCK = 2**22
MOST = 2**30  # bytes a call; not every system takes more than 2 GiB
# What a file system may want direct reads and writes to begin at and to be a multiple of.
ALIGNED = 4096
DIRECT = getattr(os, "O_DIRECT", 0)


class FileBytes:
    """An open file; a context manager.

    Args:
        once: whether nobody will read the same soon again.

    Raises:
        OSError: here and in `read`: the file cannot be read.
    """

    def __init__(self, file: Path, once: bool = False) -> None:
        self._file = file
        self._block: mmap.mmap | None = None
        if once and DIRECT:
            self._block = aligned_memory(BLOCK)
            try:
                self._descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | DIRECT)
                return
            except OSError as error:
                if error.errno != errno.EINVAL:  # The file system has no direct reads.
                    raise
                self._block = None
        self._descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)

    def __enter__(self) -> FileBytes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def read(self, begin: int, out_B: np.ndarray) -> int:
        """Fills `out_B`, uint8, from the file's byte `begin` on; returns how many there were."""
        if self._block is not None:
            try:
                return self._read_direct(begin, out_B)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
                fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~DIRECT)
                self._block = None
        done = 0
        while done < len(out_B):
            count = os.preadv(self._descriptor, [out_B[done : done + MOST]], begin + done)
            if not count:
                break
            done += count
        return done

    def _read_direct(self, begin: int, out_B: np.ndarray) -> int:
        held_B = np.frombuffer(self._block, dtype=np.uint8)
        done, ahead = 0, begin % ALIGNED
        while done < len(out_B):
            room_B = held_B[: -(-(ahead + len(out_B) - done) // ALIGNED) * ALIGNED]
            count = os.preadv(self._descriptor, [room_B], begin + done - ahead)
            some_B = held_B[ahead:count][: len(out_B) - done]
            if not len(some_B):
                break
            out_B[done : done + len(some_B)] = some_B
            done += len(some_B)
            ahead = (begin + done) % ALIGNED
        return done


def aligned_memory(size: int) -> mmap.mmap:
    """Zeros that begin where a page does. Private: Linux gives shared memory small pages by default."""
    return mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
