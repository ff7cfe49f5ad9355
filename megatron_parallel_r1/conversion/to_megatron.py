"""Hugging Face to Megatron: safetensors into a distributed checkpoint, piece by piece, in one process.

    <out>/config.json, tokenizer…              as in the source: what a run needs beside the weights
          latest_checkpointed_iteration.txt    "release", as Megatron-LM calls weights that it did not train
          release/__<rank>_<n>.distcp          the pieces that a rank of the target layout would save
                  .metadata, metadata.json, common.pt
          SHA256SUMS

Any layout can load it. Under the target one a rank finds its slices in its own files, and what several ranks
hold alike in those of the first of them.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_parallel_r1.architecture.weight_table import check_fit
from megatron_parallel_r1.checkpoint_formats.hf_folder import read_config, weight_files
from megatron_parallel_r1.checkpoint_formats.safetensors_file import StoredTensor, stored_tensors
from megatron_parallel_r1.checkpoint_formats.torch_dist import TRACKER
from megatron_parallel_r1.conversion.hashing_writer import Sink
from megatron_parallel_r1.conversion.prefetch import Rooms, loaded, tensor_in
from megatron_parallel_r1.conversion.shard_plan import Piece, Target, pieces_of
from megatron_parallel_r1.conversion.work_folder import Work, working_folder

FILE_BYTES = 2**30
RELEASE = "release"
# Small files that belong to a model in either form.
COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", "README.md")
_NOT = ("model.safetensors.index.json", TRACKER)

Advance = Callable[[int], None]


def hf_to_megatron(
    source: Path,
    out: Path,
    target: Target,
    dtype: torch.dtype | None = None,
    replace: bool = False,
    advance: Advance = lambda count: None,
    begin: Advance = lambda total: None,
) -> None:
    """Converts a folder.

    Args:
        source: a Hugging Face folder.
        out: the new folder; it appears when it is complete.
        dtype: that all weights are cast to, None: as they are.
        replace: whether `out` may be there.
        begin: is told how many bytes will be written.
        advance: is told bytes as they are.

    Raises:
        UserError: the source cannot be converted, before anything is written; or `out` cannot be written.
    """
    shape = read_config(source)
    stored = stored_tensors(weight_files(source), once=True)
    check_fit(shape, {name: tensor.shape for name, tensor in stored.items()})
    target.check(shape)
    ranks = pieces_of(shape, target)
    numbers = {id(p): p.numbers * _dtype(p, stored, dtype).itemsize for ps in ranks.values() for p in ps}
    begin(sum(numbers.values()))
    identity = {
        "to": "megatron",
        "layout": [target.tensor, target.pipeline, target.expert],
        "dtype": str(dtype),
        "source": source_identity(source, out),
    }
    files = [
        (f"{RELEASE}/__{rank}_{number}.distcp", some)
        for rank, pieces in sorted(ranks.items())
        for number, some in enumerate(_files(pieces, numbers))
    ]
    rooms = Rooms()

    def writer(pieces: list[Piece]) -> Callable[[Sink], list[dict[str, Any]]]:
        return lambda sink: _write(sink, pieces, stored, dtype, rooms, advance)

    with Work(out, identity, replace) as work:
        told = work.files([(name, writer(pieces)) for name, pieces in files])
        index = [(Path(name).name, pieces) for (name, _), pieces in zip(files, told, strict=True)]
        work.file(f"{RELEASE}/.metadata", lambda sink: sink.write(_metadata(index)))
        work.file(f"{RELEASE}/metadata.json", lambda sink: sink.write(_FORMAT))
        work.file(f"{RELEASE}/common.pt", lambda sink: torch.save(_COMMON, sink))
        work.file(TRACKER, lambda sink: sink.write(RELEASE.encode()))
        copy_companions(source, work)
        work.complete()


# As Megatron's dist_checkpointing writes them; what the pieces are like is told to whoever loads them.
_FORMAT = json.dumps(
    {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
).encode()
_COMMON = {
    "checkpoint_version": 3.0,
    "iteration": 0,
    "content_metadata": {"non_homogeneous_layers": True, "singleton_local_shards": False},
}


def source_identity(folder: Path, out: Path) -> list[list[Any]]:
    """By which a source is told from another, or from what it was before; `out` may grow inside it."""
    own = (out.resolve(), working_folder(out).resolve())
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(path.resolve().is_relative_to(one) for one in own)
    )
    return [
        [str(folder.resolve()), str(path.relative_to(folder)), stat.st_size, stat.st_mtime_ns]
        for path in files
        for stat in [path.stat()]
    ]


def copy_companions(source: Path, work: Work, but: Sequence[str] = ()) -> None:
    """Takes the small files of a model over: its config, its tokenizer, its card."""
    for file in sorted({file for pattern in COMPANIONS for file in source.glob(pattern)}):
        if file.is_file() and file.name not in (*_NOT, *but):
            work.file(file.name, lambda sink, file=file: sink.write(file.read_bytes()))


def _dtype(piece: Piece, stored: Mapping[str, StoredTensor], cast: torch.dtype | None) -> torch.dtype:
    return cast or stored[piece.sources[0].name].dtype


def _files(pieces: list[Piece], sizes: Mapping[int, int]) -> Iterator[list[Piece]]:
    """Pieces in files of about `FILE_BYTES`; a larger piece has its own."""
    some: list[Piece] = []
    for piece in pieces:
        if some and sum(sizes[id(one)] for one in some) + sizes[id(piece)] > FILE_BYTES:
            yield some
            some = []
        some.append(piece)
    yield some


def _write(
    sink: Sink,
    pieces: list[Piece],
    stored: Mapping[str, StoredTensor],
    dtype: torch.dtype | None,
    rooms: Rooms,
    advance: Advance,
) -> list[dict[str, Any]]:
    """Writes a file of pieces, each as torch.save does; returns what the checkpoint's index says of them."""

    def read(piece: Piece, memory: bytearray) -> Tensor:
        out = tensor_in(memory, piece.sizes, _dtype(piece, stored, dtype))
        _assemble(piece, stored, out)
        return out

    def need(piece: Piece) -> int:
        return piece.numbers * _dtype(piece, stored, dtype).itemsize

    told = []
    for piece, tensor in loaded(pieces, read, need, rooms):
        begin = sink.tell()
        with _no_checksums():
            torch.save(tensor, sink)
        advance(tensor.nbytes)
        told.append(
            {
                "key": piece.key,
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "whole": piece.whole,
                "corner": piece.corner,
                "sizes": piece.sizes,
                "begin": begin,
                "length": sink.tell() - begin,
            }
        )
        del tensor
    return told


@contextmanager
def _no_checksums() -> Iterator[None]:
    """Without the zip format's own CRC, which nobody reads and which takes longer than writing.

    torch keeps the setting for each thread.
    """
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _assemble(piece: Piece, stored: Mapping[str, StoredTensor], out: Tensor) -> None:
    lead = len(piece.sizes) - len(stored[piece.sources[0].name].shape)
    grouped = out.flatten(0, lead).unflatten(0, (piece.groups, -1))
    start = 0
    for source in piece.sources:
        rows = source.rows // piece.groups
        stored[source.name].read_into(grouped[:, start : start + rows], source.row, source.column)
        start += rows


def _metadata(index: list[tuple[str, list[dict[str, Any]]]]) -> bytes:
    """The index of the whole checkpoint, as torch.distributed.checkpoint pickles it."""
    tensors: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for file, pieces in index:
        for told in pieces:
            size, corner = torch.Size(told["whole"]), torch.Size(told["corner"])
            properties = TensorProperties(dtype=getattr(torch, told["dtype"]))
            whole = tensors.setdefault(told["key"], TensorStorageMetadata(properties, size, []))
            whole.chunks.append(ChunkStorageMetadata(corner, torch.Size(told["sizes"])))
            places[MetadataIndex(told["key"], corner)] = _StorageInfo(file, told["begin"], told["length"])
    stream = io.BytesIO()
    pickle.dump(Metadata(state_dict_metadata=tensors, storage_data=places, planner_data={}), stream)
    return stream.getvalue()
