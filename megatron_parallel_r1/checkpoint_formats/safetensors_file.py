"""Writes safetensors files, and reads whole tensors or some of their rows and columns without mmap.

The pages of a mapped file count as the process's memory once they are read; these reads leave none.
The format: 8 bytes with the length of a JSON header, the header, the tensors' bytes
(https://github.com/huggingface/safetensors#format).

Shapes: G groups of r rows each, X the dimensions of a row.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_parallel_r1.errors import UserError

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
)
NAMES: Mapping[torch.dtype, str] = MappingProxyType({dtype: name for name, dtype in DTYPES.items()})
MAX_READ = 2**30  # bytes per call; not every system takes more than 2 GiB
BLOCK = 2**22  # bytes read at once if they cannot be read into their final place


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Writes a file like safetensors' `save_file`, but with the permissions of the umask.

    `save_file` (0.8.0) makes it readable by its owner only.
    """
    file.touch()
    mode = file.stat().st_mode
    save_file(dict(tensors), file, metadata={"format": "pt"})
    file.chmod(mode)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file, its first byte at `begin`."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """Reads the whole tensor.

        Raises:
            UserError: as `read_into`.
        """
        out = torch.empty(self.shape, dtype=self.dtype)
        self.read_into(out[None])
        return out

    @torch.no_grad()
    def read_into(self, out_GrX: Tensor, row: int = 0, column: int | None = None) -> None:
        """Reads the G * r rows from `row` on into `out_GrX`, cast to its dtype.

        Args:
            out_GrX: a view of any strides.
            column: first of the columns to read, as many as `out_GrX` has; None: whole rows.

        Raises:
            UserError: the file cannot be read, or ends too early.
        """
        width = prod(self.shape[1:]) * self.dtype.itemsize
        groups, rows = out_GrX.shape[:2]
        with self._opened() as descriptor:
            # Straight into contiguous memory of the same dtype; otherwise through a block.
            if column is None and out_GrX.dtype == self.dtype and out_GrX.is_contiguous():
                self._read(descriptor, out_GrX, self.begin + row * width)
                return
            step_r = rows if groups > 1 else max(1, BLOCK // max(width, 1))
            step_G = max(1, BLOCK // max(width * rows, 1))
            count = min(step_G, groups) * min(step_r, rows)
            block = torch.empty((count, *self.shape[1:]), dtype=self.dtype)
            for group in range(0, groups, step_G):
                for first in range(0, rows, step_r):
                    part = out_GrX[group : group + step_G, first : first + step_r]
                    held = block[: part.shape[0] * part.shape[1]].unflatten(0, part.shape[:2])
                    self._read(descriptor, held, self.begin + (row + group * rows + first) * width)
                    columns = slice(None) if column is None else slice(column, column + part.shape[-1])
                    part.copy_(cast_to(held[..., columns], out_GrX.dtype, self.name))

    @contextmanager
    def _opened(self) -> Iterator[int]:
        try:
            descriptor = os.open(self.file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                yield descriptor
            finally:
                os.close(descriptor)
        except OSError as error:
            raise UserError(f"{self.file} cannot be read ({error.strerror}); copy it again") from None

    def _read(self, descriptor: int, out: Tensor, begin: int) -> None:
        out_B = out.view(-1).view(torch.uint8).numpy()
        done = 0
        while done < len(out_B):
            count = os.preadv(descriptor, [out_B.data[done : done + MAX_READ]], begin + done)
            if not count:
                raise UserError(f"{self.file} ends within {self.name}; copy it again")
            done += count


def stored_tensors(files: list[Path]) -> dict[str, StoredTensor]:
    """Returns all tensors of some files by name.

    Raises:
        UserError: a file is damaged, a tensor is in two of them, or its dtype is not supported.
    """
    stored: dict[str, StoredTensor] = {}
    for file in files:
        for name, entry in _header(file).items():
            if name in stored:
                raise UserError(f"{name} is in {stored[name].file.name} and in {file}; delete one of the two")
            if entry["dtype"] not in DTYPES:
                raise UserError(
                    f"{file}: {name} is of dtype {entry['dtype']}; cast it to one of {', '.join(DTYPES)}"
                )
            dtype = DTYPES[entry["dtype"]]
            stored[name] = StoredTensor(file, name, dtype, tuple(entry["shape"]), entry["begin"])
            if stored[name].nbytes != entry["size"]:
                raise UserError(f"{file} is damaged ({name} has {entry['size']} bytes); copy it again")
    return stored


def equal_tensors(left: StoredTensor, right: StoredTensor) -> bool:
    """Whether two stored matrices of any dtypes have equal values; some rows are in memory at a time."""
    if left.shape != right.shape:
        return False
    rows = max(1, BLOCK // max(left.nbytes // max(left.shape[0], 1), 1))
    for first in range(0, left.shape[0], rows):
        blocks = []
        for stored in (left, right):
            blocks.append(
                torch.empty((1, min(rows, left.shape[0] - first), *left.shape[1:]), dtype=stored.dtype)
            )
            stored.read_into(blocks[-1], first)
        if not bool((blocks[0] == blocks[1]).all()):
            return False
    return True


def cast_to(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Returns a tensor in `dtype`.

    Raises:
        UserError: a finite value would become infinite.
    """
    cast = tensor.to(dtype)
    narrower = torch.finfo(dtype).max < torch.finfo(tensor.dtype).max
    if narrower and bool(cast.isinf().any()) and bool((cast.isinf() & ~tensor.isinf()).any()):
        raise UserError(f"{name} has values that {NAMES[dtype]} cannot hold; give --dtype float32")
    return cast


def _header(file: Path) -> dict[str, dict[str, Any]]:
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            size = file.stat().st_size
            if length > size:
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is not an object")
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            if not all(type(size) is int and size >= 0 for size in [begin, end, *entry["shape"]]):
                raise ValueError(f"the place or shape of {name} is no whole number")
            if 8 + length + end > size:
                raise ValueError(f"it ends within {name}")
            entry |= {"begin": 8 + length + begin, "size": end - begin, "dtype": str(entry["dtype"])}
        return header
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); copy it again") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}); copy it again") from None
