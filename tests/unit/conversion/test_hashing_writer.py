"""A hashing writer stores what was written and returns its digest, whatever the file system supports."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_parallel_r1.conversion.hashing_writer import (
    ALIGNED,
    BLOCK,
    BLOCKS,
    DIRECT,
    HashingWriter,
    WriteAborted,
    is_direct,
)

needs_direct = pytest.mark.skipif(not DIRECT, reason="this system has no direct reads and writes")
MEMORY = Path("/dev/shm")
SIZES = (0, 1, ALIGNED - 1, ALIGNED, BLOCK - 1, BLOCK, BLOCK + 1, BLOCKS * BLOCK + 5)


def refuse_direct(monkeypatch: pytest.MonkeyPatch, call: str) -> list[object]:
    """Makes `os.open`, or only the writes after it, refuse direct I/O; returns the refused calls."""
    real, refused = getattr(os, call), []

    def refuse(target: object, *rest: object) -> int:
        if rest[0] & DIRECT if call == "open" else is_direct(target):
            refused.append(target)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(target, *rest)

    monkeypatch.setattr(os, call, refuse)
    return refused


def pieces_of(sizes: list[int]) -> list[bytearray]:
    seed = bytes(range(251))
    return [bytearray((seed * (size // 251 + 1))[:size]) for size in sizes]


def check(path: Path, pieces: list[bytearray]) -> None:
    content = b"".join(pieces)
    with HashingWriter(path, Event()) as out:
        for piece in pieces:
            before = out.tell()
            assert out.write(memoryview(piece)) == len(piece) == out.tell() - before
            piece[:] = bytes(len(piece))  # The caller may use its memory again.
        digest = out.finish()
    assert path.read_bytes() == content
    assert digest == hashlib.sha256(content).hexdigest()


@given(st.lists(st.sampled_from(SIZES) | st.integers(0, 3 * BLOCK), max_size=6))
@settings(max_examples=25, deadline=None)
def test_what_is_written_is_there(sizes: list[int]) -> None:
    with TemporaryDirectory() as folder:
        check(Path(folder) / "file", pieces_of(sizes))


@pytest.mark.skipif(not MEMORY.is_dir(), reason="there is no /dev/shm")
def test_a_file_system_in_memory() -> None:
    with TemporaryDirectory(dir=MEMORY) as folder:
        check(Path(folder) / "file", pieces_of([BLOCK + 3, 17]))


@needs_direct
@pytest.mark.parametrize("call", ["open", "pwrite"])
def test_where_direct_writes_are_refused(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = refuse_direct(monkeypatch, call)
    check(tmp_path / "file", pieces_of([2 * BLOCK, 1]))
    assert len(refused) == 1


def test_a_write_that_is_cut_short_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda where, data, begin: real(where, data[:1_000_001], begin))
    check(tmp_path / "file", pieces_of([BLOCK + 9]))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_is_reported() -> None:
    with pytest.raises(OSError, match="No space left"), HashingWriter(Path("/dev/full"), Event()) as out:
        for _ in range(2 * BLOCKS):
            out.write(bytes(BLOCK))


def test_a_stopped_writer_aborts(tmp_path: Path) -> None:
    stop = Event()
    with pytest.raises(WriteAborted), HashingWriter(tmp_path / "file", stop) as out:
        out.write(b"some")
        stop.set()
        out.write(b"more")
