"""Locates a tensor's data in a file that torch.save wrote, without reading it.

The format: a zip file with uncompressed records, among them `data.pkl`, which rebuilds the tensor, and
`data/<key>`, its storage (docs.pytorch.org/docs/stable/notes/serialization.html).
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
    """The arguments of `torch._utils._rebuild_tensor_v2` that describe a tensor."""

    storage: tuple[str, torch.dtype, str, str, int]
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, storage: Any, offset: int, size: Any, stride: Any, *_rest: Any) -> _Rebuilt:
        return cls(storage, offset, tuple(size), tuple(stride))


class _DescriptionUnpickler(pickle.Unpickler):
    """Creates only a description: it never calls a class that the file names."""

    def persistent_load(self, pid: Any) -> Any:
        return pid

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Rebuilt.of
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *_rest: data
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        raise pickle.UnpicklingError(f"it contains a {module}.{name}, not a plain tensor")


class _Part(io.RawIOBase):
    """A byte range of a file, as a file."""

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


class NotContiguous(Exception):
    """The tensor is not contiguous; the message has its strides."""


def locate_tensor(file: IO[bytes], begin: int, length: int) -> SavedTensor:
    """Locates a tensor.

    Args:
        file: its `length` bytes from `begin` on are torch.save's output for one tensor.

    Raises:
        NotContiguous: the tensor is not stored contiguously.
        pickle.UnpicklingError: the data is not a tensor, or damaged.
        zipfile.BadZipFile: the data is damaged.
    """
    try:
        return _locate(file, begin, length)
    except (ValueError, KeyError, TypeError, EOFError, IndexError) as error:
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from None


def _locate(file: IO[bytes], begin: int, length: int) -> SavedTensor:
    stream = io.BufferedReader(_Part(file, begin, length))
    with zipfile.ZipFile(stream) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        description = archive.getinfo(name)
        stream.seek(_data_offset(stream, description))
        # Not through the archive, which would verify a checksum that the writer may have left out.
        tensor = _DescriptionUnpickler(io.BytesIO(stream.read(description.file_size))).load()
        if not isinstance(tensor, _Rebuilt):
            raise pickle.UnpicklingError(f"it is a {type(tensor).__name__}, not a tensor")
        _, dtype, key, _, _ = tensor.storage
        record = archive.getinfo(f"{name.removesuffix('data.pkl')}data/{key}")
        start = _data_offset(stream, record) + tensor.offset * dtype.itemsize
    elements = prod(tensor.size)
    if record.file_size < (tensor.offset + elements) * dtype.itemsize:
        raise pickle.UnpicklingError("its data is too short")
    if elements and not torch.empty_strided(tensor.size, tensor.stride, device="meta").is_contiguous():
        raise NotContiguous(f"its strides are {tensor.stride}")
    return SavedTensor(dtype, tensor.size, begin + start)


def _data_offset(stream: IO[bytes], record: zipfile.ZipInfo) -> int:
    """Returns the offset of a record's data."""
    stream.seek(record.header_offset)
    header = stream.read(LOCAL_HEADER)
    if header[:4] != b"PK\x03\x04" or record.compress_type != zipfile.ZIP_STORED:
        raise zipfile.BadZipFile(f"{record.filename} is misplaced or compressed")
    names = sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    return record.header_offset + LOCAL_HEADER + names
