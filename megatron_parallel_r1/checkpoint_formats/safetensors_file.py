"""Writing safetensors files; reading tensors, or some of their rows and columns, without mapping them.

A mapped file counts towards a process's memory page by page as it is read; these reads leave nothing behind.
The format: 8 bytes with the length of a JSON header, the header, the tensors' bytes
(https://github.com/huggingface/safetensors#format).

Shapes: G groups of r rows each, X what a row consists of.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_parallel_r1.checkpoint_formats.direct_io import FileBytes
from megatron_parallel_r1.errors import UserError

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
)
NAMES: Mapping[torch.dtype, str] = MappingProxyType({dtype: name for name, dtype in DTYPES.items()})
BLOCK = 2**22  # bytes read at a time where they cannot go straight to their place


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Writes a file as safetensors' own `save_file`, with the rights that new files have here.

    That one leaves it to its owner alone (0.8.0), whatever the umask.
    """
    file.touch()
    rights = file.stat().st_mode
    save_file(dict(tensors), file, metadata={"format": "pt"})
    file.chmod(rights)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file, its first byte at `begin`.

    Attributes:
        once: whether nobody will read the same rows soon again; see `FileBytes`.
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
        """All of it.

        Raises:
            UserError: as `read_into`.
        """
        out = torch.empty(self.shape, dtype=self.dtype)
        self.read_into(out[None])
        return out

    @torch.no_grad()
    def read_into(self, out_GrX: Tensor, row: int = 0, column: int | None = None) -> None:
        """Fills `out_GrX`, cast to its dtype, with the G * r rows from `row` on.

        Args:
            out_GrX: a view of any strides; it wants the rows' columns from `column` on, None: whole rows.

        Raises:
            UserError: the file cannot be read, or ends too early.
        """
        width = prod(self.shape[1:]) * self.dtype.itemsize
        groups, rows = out_GrX.shape[:2]
        # Whoever wants some columns leaves the others to somebody else.
        with self._opened(self.once and column is None) as source:
            # Where it is one piece of memory of the right dtype, bytes go there; otherwise through a block.
            if column is None and out_GrX.dtype == self.dtype and out_GrX.is_contiguous():
                self._read(source, out_GrX, self.begin + row * width)
                return
            step_r = rows if groups > 1 else max(1, BLOCK // max(width, 1))
            step_G = max(1, BLOCK // max(width * rows, 1))
            most = min(step_G, groups) * min(step_r, rows)
            block = torch.empty((most, *self.shape[1:]), dtype=self.dtype)
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
    """Everything that is in some files.

    Args:
        once: as in `StoredTensor`.

    Raises:
        UserError: a file is damaged, a tensor is in two of them, or of a dtype that is not computed with.
    """
    found: dict[str, StoredTensor] = {}
    for file in files:
        for name, told in _header(file).items():
            if name in found:
                raise UserError(f"{name} is in {found[name].file.name} and in {file}; delete one of the two")
            if told["dtype"] not in DTYPES:
                raise UserError(
                    f"{file}: {name} is of dtype {told['dtype']}; first cast it to one of {', '.join(DTYPES)}"
                )
            dtype = DTYPES[told["dtype"]]
            found[name] = StoredTensor(file, name, dtype, tuple(told["shape"]), told["begin"], once)
    return found


def _header(file: Path) -> dict[str, dict]:
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            size = file.stat().st_size
            if length > size:
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for name, told in header.items():
            begin, end = told["data_offsets"]
            if 8 + length + end > size:
                raise ValueError(f"it ends before {name} does")
            told["begin"] = 8 + length + begin
        return header
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); copy it again") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}); copy it again") from None
