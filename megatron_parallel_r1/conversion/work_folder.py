"""A folder that is written file by file, resumes after a kill, and appears when it is complete.

It is written as `.<name>.converting` beside its final name. A journal there records the complete files with
their digests; after `SHA256SUMS` (the format of `sha256sum -c`) one rename gives the folder its name.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import shutil
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event, Lock
from types import TracebackType
from typing import Any

import numpy as np

from megatron_parallel_r1.checkpoint_formats.direct_io import (
    aligned_memory,
    disable_direct,
    open_direct,
    round_up,
)
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.utils.files import fsync_path, write_atomically

BLOCK = 2**22
BLOCKS = 5  # in memory: one is filled while the others are hashed and written


class WriteAborted(Exception):
    """The writer of another file has failed."""


class HashingWriter:
    """Writes a new file past the page cache and hashes it meanwhile. A context manager.

    Through the page cache the kernel would copy each byte and find a page for it, on the cores that hash: 1.8
    times the CPU time (benchmarks/conversion.py). `write`, `tell` and `flush` are all that torch.save needs.

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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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


SUMS = "SHA256SUMS"
JOURNAL = "journal.jsonl"
LOCK = "lock"
# Files written concurrently: one is read or hashed while the other waits for the disk. A killed conversion
# repeats at most these.
AT_ONCE = 2


def working_folder(final: Path) -> Path:
    """Returns the path of a folder until it is complete."""
    return final.parent / f".{final.name}.converting"


class WorkFolder:
    """A context manager for the folder; leaving it without `complete` keeps the finished files for a resume.

    Args:
        final: the folder's final path.
        identity: JSON that identifies the source and settings; files of another identity are deleted.
        replace: whether `final` may exist.

    Raises:
        UserError: `final` exists, cannot be written, or another process is writing it.
    """

    def __init__(self, final: Path, identity: Mapping[str, Any], replace: bool = False) -> None:
        self._final = final
        self.folder = working_folder(final)
        self._identity = json.loads(json.dumps(identity))
        if final.exists() and not replace:
            raise UserError(f"{final} exists; choose another folder, or replace it with --replace")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / LOCK).open("w")
        except OSError as error:
            raise UserError(f"{self.folder}: {error.strerror}; choose another folder") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise UserError(f"{final} is being written by another process; wait for it") from None
        try:
            self._done = self._read()
            self._journal = (self.folder / JOURNAL).open("ab", buffering=0)
        except OSError as error:
            self._lock.close()
            raise self._unwritable(error) from None
        self._noting = Lock()
        self._stop = Event()

    def __enter__(self) -> WorkFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._journal.close()
        self._lock.close()
        if isinstance(error, OSError):
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"{self._final} could not be written: {error.strerror or error}; fix that and start again, "
            "complete files are kept"
        )

    @property
    def resumed(self) -> int:
        """Number of complete files of an earlier attempt."""
        return len(self._done)

    def file(self, name: str, write: Callable[[HashingWriter], Any]) -> Any:
        """Writes a file unless it is complete; returns the JSON that `write` returned, now or then."""
        return self.files([(name, write)])[0]

    def files(self, files: Sequence[tuple[str, Callable[[HashingWriter], Any]]]) -> list[Any]:
        """Writes several files, `AT_ONCE` at a time; the first failure stops the others and is raised."""
        with ThreadPoolExecutor(AT_ONCE) as writers:
            try:
                calls = [writers.submit(self._file, *file) for file in files]
                # Not in order: a failure must be noticed at once.
                wait(calls, return_when=FIRST_EXCEPTION)
            except BaseException:
                self._stop.set()
                raise
        errors = [error for call in calls if (error := call.exception())]
        if errors:
            raise min(errors, key=lambda error: isinstance(error, WriteAborted))
        return [call.result() for call in calls]

    def _file(self, name: str, write: Callable[[HashingWriter], Any]) -> Any:
        if name in self._done:
            return self._done[name]["told"]
        path = self.folder / name
        try:
            if self._stop.is_set():
                raise WriteAborted
            path.parent.mkdir(parents=True, exist_ok=True)
            with HashingWriter(path, self._stop) as file:
                try:
                    result = json.loads(json.dumps(write(file)))
                except Exception as error:
                    raise file.error or error from None
                entry = {"file": name, "size": file.tell(), "sha256": file.finish(), "told": result}
            with self._noting:
                self._append(entry)
                self._done[name] = entry
        except BaseException:
            self._stop.set()
            raise
        return result

    def complete(self) -> None:
        """Writes the digests and renames the folder to its final path."""
        expected = {*self._done, SUMS}
        for path in self.folder.rglob("*"):
            if path.is_file() and str(path.relative_to(self.folder)) not in expected:
                path.unlink()
        lines = [f"{entry['sha256']}  {name}\n" for name, entry in sorted(self._done.items())]
        with (self.folder / SUMS).open("w") as stream:
            stream.writelines(lines)
            stream.flush()
            os.fsync(stream.fileno())
        for folder in [self.folder, *(path for path in self.folder.rglob("*") if path.is_dir())]:
            fsync_path(folder)
        if self._final.exists():
            doomed = self._final.with_name(f".{self._final.name}.replaced")
            shutil.rmtree(doomed, ignore_errors=True)
            self._final.rename(doomed)
            self.folder.rename(self._final)
            shutil.rmtree(doomed, ignore_errors=True)
        else:
            self.folder.rename(self._final)
        fsync_path(self._final.parent)

    def _read(self) -> dict[str, dict[str, Any]]:
        """Returns the complete files of an earlier attempt with the same identity; deletes all else."""
        journal, entries = self.folder / JOURNAL, []
        for line in journal.read_bytes().splitlines() if journal.is_file() else ():
            try:
                entries.append(json.loads(line))
            except ValueError:  # the last one, torn by a kill
                break
        if not entries or entries[0] != self._identity:
            for left in self.folder.iterdir():
                if left.name != LOCK:
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            entries = []
        whole = [
            entry
            for entry in entries[1:]
            if (path := self.folder / entry["file"]).is_file() and path.stat().st_size == entry["size"]
        ]
        # Beside the old one, which is kept where there is no room for another.
        write_atomically(journal, _lines(self._identity, *whole))
        return {entry["file"]: entry for entry in whole}

    def _append(self, entry: Mapping[str, Any]) -> None:
        line = _lines(entry)
        while line:
            line = line[self._journal.write(line) :]
        os.fsync(self._journal.fileno())


def _lines(*entries: Mapping[str, Any]) -> bytes:
    return b"".join(json.dumps(entry).encode() + b"\n" for entry in entries)
