"""Writes a file past the page cache (O_DIRECT, where the file system supports it) and hashes it meanwhile.

Through the page cache the kernel copies each byte and finds a page for it, on the cores that hash: 1.8 times
the CPU time (docs/checkpoints.md). Direct reads and read-ahead gained less than 20 % and are not used.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np

# The alignment and granularity that a file system may require of direct reads and writes.
ALIGNED = 4096
DIRECT = getattr(os, "O_DIRECT", 0)
BLOCK = 2**22
BLOCKS = 5  # in memory: one is filled while the others are hashed and written


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


class WriteAborted(Exception):
    """The writer of another file has failed."""


class HashingWriter:
    """A new file; `write`, `tell` and `flush` are all that torch.save needs. A context manager.

    Args:
        stop: set when the file is no longer needed.

    Attributes:
        error: what `write` raised; torch.save raises an error of its own instead.
    """

    def __init__(self, path: Path, stop: Event) -> None:
        self.error: Exception | None = None
        self._stop = stop
        self._digest = hashlib.sha256()
        # One thread each: blocks are hashed in order, and a second concurrent write gains nothing.
        self._hasher, self._writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._in_flight: deque[tuple[mmap.mmap, tuple[Future[Any], ...]]] = deque()
        self._block = aligned_memory(BLOCK)
        self._descriptor = open_direct(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._begin = self._filled = self._size = 0  # the block's offset in the file, its bytes, all bytes

    def __enter__(self) -> HashingWriter:
        return self

    def __exit__(self, *error: object) -> None:
        for pool in (self._hasher, self._writer):
            pool.shutdown(cancel_futures=True)
        os.close(self._descriptor)

    def write(self, data: Any) -> int:
        """Appends bytes; `data` may be modified afterwards.

        Raises:
            OSError: these or earlier bytes could not be written.
            WriteAborted: `stop` is set.
        """
        try:
            self._append(np.frombuffer(data, dtype=np.uint8))
        except Exception as error:
            self.error = error
            raise
        return memoryview(data).nbytes

    def _append(self, data_B: np.ndarray) -> None:
        done = 0
        while done < len(data_B):
            if self._stop.is_set():
                raise WriteAborted
            chunk_B = data_B[done : done + BLOCK - self._filled]
            # numpy releases the GIL.
            np.frombuffer(self._block, dtype=np.uint8)[self._filled : self._filled + len(chunk_B)] = chunk_B
            self._filled += len(chunk_B)
            done += len(chunk_B)
            if self._filled == BLOCK:
                self._submit_block()
        self._size += len(data_B)

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        """Does nothing: data is durable only after `finish`."""

    def finish(self) -> str:
        """Waits until everything is on the disk, and returns the SHA-256.

        Raises:
            OSError: it could not be written.
        """
        if self._filled:
            self._submit_block()
        while self._in_flight:
            self._wait_oldest()
        os.ftruncate(self._descriptor, self._size)
        os.fsync(self._descriptor)
        return self._digest.hexdigest()

    def _submit_block(self) -> None:
        """Submits the block to be hashed and written, and takes another one."""
        # After the last block's bytes follow stale ones, which `finish` truncates.
        whole = round_up(self._filled)
        hashing = self._hasher.submit(self._digest.update, memoryview(self._block)[: self._filled])
        writing = self._writer.submit(self._put, memoryview(self._block)[:whole], self._begin)
        self._in_flight.append((self._block, (hashing, writing)))
        self._begin += self._filled
        self._filled = 0
        self._block = self._wait_oldest() if len(self._in_flight) == BLOCKS else aligned_memory(BLOCK)

    def _wait_oldest(self) -> mmap.mmap:
        """Waits for the block that was submitted first."""
        block, calls = self._in_flight.popleft()
        for call in calls:
            call.result()
        return block

    def _put(self, data: memoryview, begin: int) -> None:
        while data:
            try:
                count = os.pwrite(self._descriptor, data, begin)
            except OSError as error:
                disable_direct(self._descriptor, error)
                continue
            data, begin = data[count:], begin + count
