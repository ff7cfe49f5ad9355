"""Bytes read past the page cache are those read through it, wherever they begin and end."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_parallel_r1.checkpoint_formats.direct_io import ALIGNED, BLOCK, FileBytes
from tests.unit.checkpoint_formats.no_direct import needs_direct, refuse_direct

SIZE = 2 * BLOCK + ALIGNED + 321


@pytest.fixture(scope="module")
def content() -> bytes:
    return np.random.default_rng(0).bytes(SIZE)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> Path:
    path = tmp_path_factory.mktemp("bytes") / "file"
    path.write_bytes(content)
    return path


def check(file: Path, content: bytes, begin: int, size: int, once: bool) -> None:
    out_B = np.zeros(size + 2, dtype=np.uint8)
    with FileBytes(file, once) as source:
        count = source.read(begin, out_B[1:-1])
    expected = content[begin : begin + size]
    assert count == len(expected)
    assert out_B.tobytes() == b"\0" + expected + bytes(size - count + 1)


NEAR = st.sampled_from([0, 1, ALIGNED - 1, ALIGNED, ALIGNED + 1, BLOCK - 1, BLOCK, BLOCK + 1, SIZE - 1, SIZE])


@pytest.mark.parametrize("once", [False, True])
@given(begin=NEAR | st.integers(0, SIZE), size=NEAR | st.integers(0, SIZE))
def test_what_is_read(file: Path, content: bytes, once: bool, begin: int, size: int) -> None:
    """A file that ends too early gives what it has."""
    check(file, content, begin, size, once)


@needs_direct
@pytest.mark.parametrize("call", ["open", "preadv"])
def test_where_direct_reads_are_refused(
    call: str, file: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = refuse_direct(monkeypatch, call)
    check(file, content, 5, BLOCK + 9, once=True)
    assert len(refused) == 1


def test_a_failing_disk_is_told(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*told: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OSError, match="Input/output error"), FileBytes(file, once=True) as source:
        source.read(0, np.zeros(ALIGNED, dtype=np.uint8))
