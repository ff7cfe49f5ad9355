"""A file that is written past the page cache and hashed on the way, neither waited for until memory runs out.

Through the page cache the kernel would copy each byte and look for a page to hold it, on cores that have to
hash.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Any

import numpy as np

from megatron_parallel_r1.checkpoint_formats.direct_io import aligned_memory, give_up, open_direct, rounded_up

BLOCK = 2**22
BLOCKS = 5  # in memory: one being filled, the others being hashed and written


class Stopped(Exception):
    """Another file's writer has failed, so that this one need not go on."""


class Sink:
    """A new file; `write`, `tell` and `flush` are all that torch.save needs. A context manager.

    Args:
        stop: set when what is written is of no use any more.

    Attributes:
        error: what `write` raised; torch.save puts one of its own in its place.
    """

    def __init__(self, path: Path, stop: Event) -> None:
        self.error: Exception | None = None
        self._stop = stop
        self._digest = hashlib.sha256()
        # One thread each: blocks are hashed in order, and a second write at a time gains nothing.
        self._hasher, self._writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._under_way: deque[tuple[mmap.mmap, tuple[Future[Any], ...]]] = deque()
        self._block = aligned_memory(BLOCK)
        self._descriptor = open_direct(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._begin = self._filled = self._size = 0  # the block's place in the file, its bytes, all bytes

    def __enter__(self) -> Sink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pool in (self._hasher, self._writer):
            pool.shutdown(cancel_futures=True)
        os.close(self._descriptor)

    def write(self, data: Any) -> int:
        """Appends bytes; `data` may be changed afterwards.

        Raises:
            OSError: these, or earlier bytes, could not be written.
            Stopped: nobody wants them.
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
                raise Stopped
            some_B = data_B[done : done + BLOCK - self._filled]
            # By numpy, which lets other threads run meanwhile.
            np.frombuffer(self._block, dtype=np.uint8)[self._filled : self._filled + len(some_B)] = some_B
            self._filled += len(some_B)
            done += len(some_B)
            if self._filled == BLOCK:
                self._hand_over()
        self._size += len(data_B)

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        """Nothing is promised before `finish`."""

    def finish(self) -> str:
        """Returns the SHA-256 once everything is on the disk.

        Raises:
            OSError: it cannot be.
        """
        if self._filled:
            self._hand_over()
        while self._under_way:
            self._oldest()
        os.ftruncate(self._descriptor, self._size)
        os.fsync(self._descriptor)
        return self._digest.hexdigest()

    def _hand_over(self) -> None:
        """Has the block hashed and written, and goes on with another."""
        # Behind the last one's bytes lie older ones, which `finish` cuts off.
        whole = rounded_up(self._filled)
        hashing = self._hasher.submit(self._digest.update, memoryview(self._block)[: self._filled])
        writing = self._writer.submit(self._put, memoryview(self._block)[:whole], self._begin)
        self._under_way.append((self._block, (hashing, writing)))
        self._begin += self._filled
        self._filled = 0
        self._block = self._oldest() if len(self._under_way) == BLOCKS else aligned_memory(BLOCK)

    def _oldest(self) -> mmap.mmap:
        """Waits for the block that was handed over first."""
        block, calls = self._under_way.popleft()
        for call in calls:
            call.result()
        return block

    def _put(self, data: memoryview, begin: int) -> None:
        while data:
            try:
                count = os.pwrite(self._descriptor, data, begin)
            except OSError as error:
                give_up(self._descriptor, error)
                continue
            data, begin = data[count:], begin + count
