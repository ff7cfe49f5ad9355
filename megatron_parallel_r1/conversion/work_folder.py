"""A folder that is written file by file, can be gone on with after a kill, and appears when it is complete.

It grows beside its final name as `.<name>.converting`. A journal there remembers which files are whole, with
their digests; when `SHA256SUMS` (as `sha256sum -c` reads it) is in it, one rename gives the folder its name.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event, Lock
from types import TracebackType
from typing import Any

from megatron_parallel_r1.conversion.hashing_writer import Sink, Stopped
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.utils.files import fsync_path, write_atomically

SUMS = "SHA256SUMS"
JOURNAL = "journal.jsonl"
LOCK = "lock"
# Files that are written side by side, one being read or hashed while the other waits for the disk; a killed
# conversion does these again at most.
AT_ONCE = 2


def working_folder(final: Path) -> Path:
    """Where a folder grows until it gets its name."""
    return final.parent / f".{final.name}.converting"


class Work:
    """A context manager around the folder; leaving it without `complete` keeps what is done for the next try.

    Args:
        final: the name that the folder will get.
        identity: of what is converted and how, JSON; what was begun with another is thrown away.
        replace: whether a folder of the final name may be there already.

    Raises:
        UserError: `final` exists, cannot be written, or another process is at it.
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

    def __enter__(self) -> Work:
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
            f"{self._final} could not be written: {error.strerror or error}; mend that and start again, "
            "files that are whole are kept"
        )

    @property
    def resumed(self) -> int:
        """Files that an earlier try has left."""
        return len(self._done)

    def file(self, name: str, write: Callable[[Sink], Any]) -> Any:
        """Writes a file unless it is there already; returns what `write` returned then or now, JSON."""
        return self.files([(name, write)])[0]

    def files(self, each: Sequence[tuple[str, Callable[[Sink], Any]]]) -> list[Any]:
        """`file` for each, `AT_ONCE` at a time; the first that fails stops the others and is raised."""
        with ThreadPoolExecutor(AT_ONCE) as writers:
            try:
                calls = [writers.submit(self._file, *one) for one in each]
                # Not in their order: a failure is to be met where it is.
                wait(calls, return_when=FIRST_EXCEPTION)
            except BaseException:
                self._stop.set()
                raise
        errors = [error for call in calls if (error := call.exception())]
        if errors:
            raise min(errors, key=lambda error: isinstance(error, Stopped))
        return [call.result() for call in calls]

    def _file(self, name: str, write: Callable[[Sink], Any]) -> Any:
        if name in self._done:
            return self._done[name]["told"]
        path = self.folder / name
        try:
            if self._stop.is_set():
                raise Stopped
            path.parent.mkdir(parents=True, exist_ok=True)
            with Sink(path, self._stop) as sink:
                try:
                    told = json.loads(json.dumps(write(sink)))
                except Exception as error:
                    raise sink.error or error from None
                entry = {"file": name, "size": sink.tell(), "sha256": sink.finish(), "told": told}
            with self._noting:
                self._append(entry)
                self._done[name] = entry
        except BaseException:
            self._stop.set()
            raise
        return told

    def complete(self) -> None:
        """Gives the folder its name."""
        wanted = {*self._done, SUMS}
        for left in self.folder.rglob("*"):
            if left.is_file() and str(left.relative_to(self.folder)) not in wanted:
                left.unlink()
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
        """What is whole of an earlier try with the same identity; anything else is cleared away."""
        journal, entries = self.folder / JOURNAL, []
        for line in journal.read_bytes().splitlines() if journal.is_file() else ():
            try:
                entries.append(json.loads(line))
            except ValueError:  # the last one, of a process that was killed in it
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
