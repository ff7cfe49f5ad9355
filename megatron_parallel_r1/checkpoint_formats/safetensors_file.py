"""Writes safetensors files, and reads whole tensors or some of their rows and columns without mmap.

The pages of a mapped file count as the process's memory once they are read; these reads leave none.
The format: 8 bytes with the length of a JSON header, the header, the tensors' bytes
(https://github.com/huggingface/safetensors#format).

Shapes: G groups of r rows each, X the dimensions of a row.
"""

from __future__ import annotations

import json
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

from megatron_parallel_r1.checkpoint_formats.direct_io import FileBytes
from megatron_parallel_r1.errors import UserError

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
)
NAMES: Mapping[torch.dtype, str] = MappingProxyType({dtype: name for name, dtype in DTYPES.items()})
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
    """A tensor in a file, its first byte at `begin`.

    Attributes:
        once: whether the rows will not be read again soon (`FileBytes`).
    """

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    once: bool = False

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
        # The other columns of the same rows will be read for other shards.
        with self._opened(self.once and column is None) as source:
            # Straight into contiguous memory of the same dtype; otherwise through a block.
            if column is None and out_GrX.dtype == self.dtype and out_GrX.is_contiguous():
                self._read(source, out_GrX, self.begin + row * width)
                return
            step_r = rows if groups > 1 else max(1, BLOCK // max(width, 1))
            step_G = max(1, BLOCK // max(width * rows, 1))
            count = min(step_G, groups) * min(step_r, rows)
            block = torch.empty((count, *self.shape[1:]), dtype=self.dtype)
            for group in range(0, groups, step_G):
                for first in range(0, rows, step_r):
                    part = out_GrX[group : group + step_G, first : first + step_r]
                    held = block[: part.shape[0] * part.shape[1]].unflatten(0, part.shape[:2])
                    self._read(source, held, self.begin + (row + group * rows + first) * width)
                    part.copy_(held if column is None else held[..., column : column + part.shape[-1]])

    @contextmanager
    def _opened(self, once: bool) -> Iterator[FileBytes]:
        try:
            with FileBytes(self.file, once) as source:
                yield source
        except OSError as error:
            raise UserError(f"{self.file} cannot be read ({error.strerror}); copy it again") from None

    def _read(self, source: FileBytes, out: Tensor, begin: int) -> None:
        if source.read(begin, out.view(-1).view(torch.uint8).numpy()) < out.nbytes:
            raise UserError(f"{self.file} ends within {self.name}; copy it again")


def stored_tensors(files: list[Path], once: bool = False) -> dict[str, StoredTensor]:
    """Returns all tensors of some files by name.

    Args:
        once: as in `StoredTensor`.

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
            stored[name] = StoredTensor(file, name, dtype, tuple(entry["shape"]), entry["begin"], once)
    return stored


def _header(file: Path) -> dict[str, dict[str, Any]]:
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            size = file.stat().st_size
            if length > size:
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            if 8 + length + end > size:
                raise ValueError(f"it ends within {name}")
            entry["begin"] = 8 + length + begin
        return header
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); copy it again") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}); copy it again") from None
