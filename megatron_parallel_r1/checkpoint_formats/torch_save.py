"""Where torch.save put a tensor's numbers, told without reading them.

The format: a zip file whose records are stored as they are, among them `data.pkl`, which rebuilds the tensor,
and `data/<key>`, its storage (docs.pytorch.org/docs/stable/notes/serialization.html).
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from math import prod
from typing import IO, Any

import torch
from torch.storage import _storage_type_to_dtype_map

DTYPES = _storage_type_to_dtype_map()
LOCAL_HEADER = 30  # bytes before a record's name and extra field, whose lengths are at 26 and 28


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A contiguous tensor in a file; `begin` is its first byte."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int


@dataclass(frozen=True, slots=True)
class _Rebuilt:
    """The arguments of `torch._utils._rebuild_tensor_v2` that say what a tensor is like."""

    storage: tuple[str, torch.dtype, str, str, int]
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, storage: Any, offset: int, size: Any, stride: Any, *_rest: Any) -> _Rebuilt:
        return cls(storage, offset, tuple(size), tuple(stride))


class _Reader(pickle.Unpickler):
    """Makes nothing but a description: no class of a file's own choice is ever called."""

    def persistent_load(self, told: Any) -> Any:
        return told

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Rebuilt.of
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *_rest: data
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        raise pickle.UnpicklingError(f"it holds a {module}.{name}, no plain tensor")


class _Part(io.RawIOBase):
    """Some bytes of a file, as a file."""

    def __init__(self, stream: IO[bytes], begin: int, length: int) -> None:
        self._stream, self._begin, self._length, self._at = stream, begin, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, memory: Any) -> int:
        self._stream.seek(self._begin + self._at)
        data = self._stream.read(max(0, min(len(memory), self._length - self._at)))
        memory[: len(data)] = data
        self._at += len(data)
        return len(data)


class OddStrides(Exception):
    """The tensor is not contiguous; the message has its strides."""


def find_tensor(file: IO[bytes], begin: int, length: int) -> SavedTensor:
    """
    Args:
        file: where `length` bytes from `begin` on are what torch.save wrote of one tensor.

    Raises:
        OddStrides: a reader of bytes alone cannot make the tensor of them.
        pickle.UnpicklingError: it is something else than a tensor, or damaged.
        zipfile.BadZipFile: it is damaged.
    """
    try:
        return _found(file, begin, length)
    except (ValueError, KeyError, TypeError, EOFError, IndexError) as error:
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from None


def _found(file: IO[bytes], begin: int, length: int) -> SavedTensor:
    stream = io.BufferedReader(_Part(file, begin, length))
    with zipfile.ZipFile(stream) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        description = archive.getinfo(name)
        stream.seek(_place(stream, description))
        # Not by the archive, which would hold it against a check sum; whoever writes may leave those out.
        told = _Reader(io.BytesIO(stream.read(description.file_size))).load()
        if not isinstance(told, _Rebuilt):
            raise pickle.UnpicklingError(f"it is a {type(told).__name__}, no tensor")
        _, dtype, key, _, _ = told.storage
        record = archive.getinfo(f"{name.removesuffix('data.pkl')}data/{key}")
        place = _place(stream, record) + told.offset * dtype.itemsize
    numbers = prod(told.size)
    if record.file_size < (told.offset + numbers) * dtype.itemsize:
        raise pickle.UnpicklingError("its numbers are too few")
    if numbers and not torch.empty_strided(told.size, told.stride, device="meta").is_contiguous():
        raise OddStrides(f"its strides are {told.stride}")
    return SavedTensor(dtype, told.size, begin + place)


def _place(stream: IO[bytes], record: zipfile.ZipInfo) -> int:
    """Where a record's own bytes begin."""
    stream.seek(record.header_offset)
    header = stream.read(LOCAL_HEADER)
    if header[:4] != b"PK\x03\x04" or record.compress_type != zipfile.ZIP_STORED:
        raise zipfile.BadZipFile(f"{record.filename} is not where it should be, or compressed")
    names = sum(int.from_bytes(header[place : place + 2], "little") for place in (26, 28))
    return record.header_offset + LOCAL_HEADER + names
