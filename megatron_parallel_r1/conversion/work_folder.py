"""A folder that is written file by file, resumes after a kill, and appears when it is complete.

It is written as `.<name>.converting` beside its final name. A journal there records the complete files with
their digests; after `SHA256SUMS` (the format of `sha256sum -c`) one rename gives the folder its name.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from threading import Condition, Event, Lock
from types import TracebackType
from typing import Any

from megatron_parallel_r1.conversion.hashing_writer import HashingWriter, WriteAborted
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.utils.files import fsync_path, write_atomically

SUMS = "SHA256SUMS"
JOURNAL = "journal.jsonl"
LOCK = "lock"
# Files written concurrently: one is read or hashed while the other waits for the disk. A killed conversion
# repeats at most these.
AT_ONCE = 2
# Most bytes of several weights in memory at once; a larger weight is in memory alone. With Python and torch,
# a conversion needs at most its largest weight and one gigabyte.
MAX_BYTES = 700_000_000


class MemoryBudget:
    """Bounds the memory of the files that are written at the same time."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._used = 0

    @contextmanager
    def reserve(self, size: int) -> Iterator[None]:
        """Waits until `size` bytes fit into `MAX_BYTES`, or nothing else is reserved."""
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + size <= MAX_BYTES)
            self._used += size
        try:
            yield
        finally:
            with self._changed:
                self._used -= size
                self._changed.notify_all()


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
