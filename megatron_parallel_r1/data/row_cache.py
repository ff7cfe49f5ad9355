"""A content-addressed disk cache of laid-out rows of worked examples.

A file holds the rows of up to 512 examples. Its name is the hash of the examples' text, the tokenizer's
files, the template, the mode and the code that lays out a row, so an entry is never stale. Files are written
atomically: processes that share a folder at worst repeat each other's work. A file whose checksum does not
match is written again.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_parallel_r1 import thought
from megatron_parallel_r1.data import prompts
from megatron_parallel_r1.data.problems import Example
from megatron_parallel_r1.data.prompts import messages_of
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.thought.formats import PARALLEL_R1
from megatron_parallel_r1.thought.layout import Mode, Row
from megatron_parallel_r1.thought.tags import Tags
from megatron_parallel_r1.thought.tokenizer import save_tokenizer
from megatron_parallel_r1.utils.files import write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GROUP = 512
_CHECKSUM = hashlib.sha256().digest_size


@dataclass(frozen=True, slots=True)
class RowCache:
    """Cached rows of one tokenizer, template and mode.

    Attributes:
        folder: created with the first file; other caches and processes may share it.
        tokenizer: the hash of the tokenizer's files (`tokenizer_hash`).
        template: the prompt template; the rendered prompt enters the hash.
        tags: with the format of the traces; None: Parallel-R1's.
    """

    folder: Path
    tokenizer: str
    template: str
    mode: Mode
    tags: Tags | None = None

    def rows(self, examples: Sequence[Example], to_row: Callable[[Example], Row]) -> list[Row]:
        """Returns the row of each example, from disk or by `to_row`.

        Raises:
            UserError: the folder cannot be written. Errors of `to_row` pass through.
        """
        code = _code_hash(to_row)
        rows: list[Row] = []
        for start in range(0, len(examples), _GROUP):
            group = examples[start : start + _GROUP]
            file = self.folder / f"{self._key(group, code)}.rows"
            cached = _read(file, len(group))
            if cached is None:
                cached = [to_row(example) for example in group]
                _write(file, cached)
            rows += cached
        return rows

    def _key(self, group: Sequence[Example], code: str) -> str:
        texts = [(messages_of(self.template, example.problem), example.response) for example in group]
        format = [repr(self.tags.format)] if self.tags and self.tags.format != PARALLEL_R1 else []
        key = [code, self.tokenizer, self.mode, texts, *format]
        return hashlib.sha256(json.dumps(key).encode()).hexdigest()


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the hash of the tokenizer's saved files, independent of where it was loaded from."""
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(tokenizer, folder)
        return _files_hash(sorted(path for path in Path(folder).rglob("*") if path.is_file()))


def _code_hash(to_row: Callable[[Example], Row]) -> str:
    """Returns the hash of the sources that define a row: `thought`, the encoding, the module of `to_row`."""
    function = to_row
    while isinstance(function, partial):
        function = function.func
    sources = sorted(Path(thought.__file__).parent.glob("*.py"))
    for module in (prompts, inspect.getmodule(function)):
        source = inspect.getsourcefile(module) if module is not None else None
        assert source is not None, "a row is built by code that has a source file"
        sources.append(Path(source))
    return _files_hash(sources)


def _files_hash(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        digest.update(f"{file.name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def _read(file: Path, count: int) -> list[Row] | None:
    """Returns the rows of a file; None if the file is missing or damaged."""
    try:
        content = file.read_bytes()
    except OSError:
        return None
    checksum, packed = content[:_CHECKSUM], content[_CHECKSUM:]
    if hashlib.sha256(packed).digest() != checksum:
        return None
    return list(_unpacked(np.frombuffer(packed, "<i4"), count))


def _write(file: Path, rows: Sequence[Row]) -> None:
    packed = np.concatenate([part for row in rows for part in _parts(row)]).astype("<i4").tobytes()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, hashlib.sha256(packed).digest() + packed)
    except OSError as error:
        raise UserError(
            f"{file.parent}: cannot cache rows there ({error.strerror or error}); "
            "set another cache folder, or none"
        ) from error


def _parts(row: Row) -> Iterator[np.ndarray]:
    """Yields depth D and length L, then the row's 3 + 2 D vectors."""
    yield np.array([len(row.hide_lo_DL), len(row)], np.int32)
    yield from (row.tokens_L, row.positions_L, row.source_L, row.hide_lo_DL.ravel(), row.hide_hi_DL.ravel())


def _unpacked(packed: np.ndarray, count: int) -> Iterator[Row]:
    at = 0
    for _ in range(count):
        depth, length = packed[at : at + 2].tolist()
        at += 2
        block_KL = packed[at : at + (3 + 2 * depth) * length].reshape(3 + 2 * depth, length).astype(np.int32)
        at += block_KL.size
        yield Row(
            tokens_L=block_KL[0],
            positions_L=block_KL[1],
            hide_lo_DL=block_KL[3 : 3 + depth],
            hide_hi_DL=block_KL[3 + depth :],
            source_L=block_KL[2],
        )
