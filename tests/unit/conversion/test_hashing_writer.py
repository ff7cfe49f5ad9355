"""A sink leaves what was written and tells its digest, whatever the file system takes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_parallel_r1.checkpoint_formats.direct_io import ALIGNED
from megatron_parallel_r1.conversion.work_folder import BLOCK, BLOCKS, HashingWriter, WriteAborted
from tests.unit.checkpoint_formats.no_direct import needs_direct, refuse_direct

MEMORY = Path("/dev/shm")
SIZES = (0, 1, ALIGNED - 1, ALIGNED, BLOCK - 1, BLOCK, BLOCK + 1, BLOCKS * BLOCK + 5)


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
def test_a_full_disk_is_met() -> None:
    with pytest.raises(OSError, match="No space left"), HashingWriter(Path("/dev/full"), Event()) as out:
        for _ in range(2 * BLOCKS):
            out.write(bytes(BLOCK))


def test_who_is_told_to_stop_does(tmp_path: Path) -> None:
    stop = Event()
    with pytest.raises(WriteAborted), HashingWriter(tmp_path / "file", stop) as out:
        out.write(b"some")
        stop.set()
        out.write(b"more")
