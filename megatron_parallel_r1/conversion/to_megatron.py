"""Converts a Hugging Face folder to a distributed checkpoint of Megatron, shard by shard, in one process.

    <out>/config.json, tokenizer…              copied from the source
          latest_checkpointed_iteration.txt    "release", as Megatron-LM names weights alone
          release/__<rank>_<n>.distcp          the shards that a rank of the target layout would save
                  .metadata, metadata.json, common.pt
          SHA256SUMS

Any layout can load it. Under the target layout a rank finds its shards in its own files, and replicated ones
in those of the first rank that has them.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

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

from megatron_parallel_r1.checkpoint_formats.companions import companions
from megatron_parallel_r1.checkpoint_formats.hf_folder import INDEX, read_config, stored_weights
from megatron_parallel_r1.checkpoint_formats.safetensors_file import NAMES, StoredTensor
from megatron_parallel_r1.checkpoint_formats.torch_dist import TRACKER
from megatron_parallel_r1.conversion.hashing_writer import HashingWriter
from megatron_parallel_r1.conversion.shard_plan import Shard, Target, shard_plan
from megatron_parallel_r1.conversion.work_folder import MemoryBudget, WorkFolder, working_folder
from megatron_parallel_r1.data.tokenizers import check_companion_tokenizer
from megatron_parallel_r1.errors import UserError

FILE_BYTES = 2**30
RELEASE = "release"
_EXCLUDED = (INDEX, TRACKER)

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
        dtype: to cast all weights to; None: no cast.
        replace: whether `out` may exist.
        begin: called with the number of bytes that will be written.
        advance: called with the number of bytes after each write.

    Raises:
        UserError: the source cannot be converted, before anything is written; or `out` cannot be written.
    """
    config = read_config(source)
    stored = stored_weights(source, config)
    check_companion_tokenizer(source)
    target.check(config)
    ranks = shard_plan(config, target)
    if dtype is None:
        _check_dtypes([shard for shards in ranks.values() for shard in shards], stored)
    sizes = {id(s): s.elements * _dtype(s, stored, dtype).itemsize for own in ranks.values() for s in own}
    begin(sum(sizes.values()))
    identity = {
        "to": "megatron",
        "layout": [target.tensor, target.pipeline, target.expert],
        "dtype": str(dtype),
        "source": source_identity(source, out),
    }
    files = [
        (f"{RELEASE}/__{rank}_{number}.distcp", group)
        for rank, shards in sorted(ranks.items())
        for number, group in enumerate(_files(shards, sizes))
    ]
    budget = MemoryBudget()

    def writer(shards: list[Shard]) -> Callable[[HashingWriter], list[dict[str, Any]]]:
        return lambda file: _write(file, shards, stored, dtype, budget, advance)

    with WorkFolder(out, identity, replace) as work:
        entries = work.files([(name, writer(shards)) for name, shards in files])
        index = [(Path(name).name, some) for (name, _), some in zip(files, entries, strict=True)]
        work.file(f"{RELEASE}/.metadata", lambda file: file.write(_metadata(index)))
        work.file(f"{RELEASE}/metadata.json", lambda file: file.write(_FORMAT))
        work.file(f"{RELEASE}/common.pt", lambda file: torch.save(_COMMON, cast(IO[bytes], file)))
        work.file(TRACKER, lambda file: file.write(RELEASE.encode()))
        copy_companions(source, work)
        work.complete()


# As Megatron's dist_checkpointing writes them; `content_metadata` describes the shards to a loader.
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
    """Identifies a source and its state by its files' sizes and times; `out` may lie inside it."""
    outputs = (out.resolve(), working_folder(out).resolve())
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(path.resolve().is_relative_to(output) for output in outputs)
    )
    return [
        [str(folder.resolve()), str(path.relative_to(folder)), stat.st_size, stat.st_mtime_ns]
        for path in files
        for stat in [path.stat()]
    ]


def copy_companions(source: Path, work: WorkFolder, exclude: Sequence[str] = ()) -> None:
    """Copies the small files of a model: its config, its tokenizer, its card."""
    for file in companions(source):
        name = str(file.relative_to(source))
        if name not in (*_EXCLUDED, *exclude):
            work.file(name, partial(_copy, file))


def _copy(source: Path, out: HashingWriter) -> int:
    return out.write(source.read_bytes())


def _check_dtypes(shards: Sequence[Shard], stored: Mapping[str, StoredTensor]) -> None:
    """Checks that all Hugging Face tensors of each Megatron tensor have one dtype.

    Raises:
        UserError: two differ.
    """
    first: dict[str, StoredTensor] = {}
    for shard in shards:
        for part in shard.sources:
            left, right = first.setdefault(shard.key, stored[part.name]), stored[part.name]
            if left.dtype != right.dtype:
                raise UserError(
                    f"{left.name} is {NAMES[left.dtype]} and {right.name} is {NAMES[right.dtype]}, which "
                    "Megatron keeps as one tensor; give --dtype float32, or another"
                )


def _dtype(shard: Shard, stored: Mapping[str, StoredTensor], cast: torch.dtype | None) -> torch.dtype:
    return cast or stored[shard.sources[0].name].dtype


def _files(shards: list[Shard], sizes: Mapping[int, int]) -> Iterator[list[Shard]]:
    """Groups shards into files of about `FILE_BYTES`; a larger shard has a file of its own."""
    group: list[Shard] = []
    for shard in shards:
        if group and sum(sizes[id(member)] for member in group) + sizes[id(shard)] > FILE_BYTES:
            yield group
            group = []
        group.append(shard)
    yield group


def _write(
    file: HashingWriter,
    shards: list[Shard],
    stored: Mapping[str, StoredTensor],
    dtype: torch.dtype | None,
    budget: MemoryBudget,
    advance: Advance,
) -> list[dict[str, Any]]:
    """Writes a file of shards, each by torch.save; returns their entries of the checkpoint's index."""
    entries = []
    for shard in shards:
        shard_dtype = _dtype(shard, stored, dtype)
        with budget.reserve(shard.elements * shard_dtype.itemsize):
            tensor = torch.empty(shard.sizes, dtype=shard_dtype)
            _assemble(shard, stored, tensor)
            begin = file.tell()
            with _no_checksums():
                torch.save(tensor, cast(IO[bytes], file))
            advance(tensor.nbytes)
            del tensor  # before another file takes its memory
        entries.append(
            {
                "key": shard.key,
                "dtype": str(shard_dtype).removeprefix("torch."),
                "whole": shard.whole,
                "corner": shard.offset,
                "sizes": shard.sizes,
                "begin": begin,
                "length": file.tell() - begin,
            }
        )
    return entries


@contextmanager
def _no_checksums() -> Iterator[None]:
    """Omits the zip format's CRC, which nobody reads and which takes longer than writing.

    torch's setting is per thread.
    """
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _assemble(shard: Shard, stored: Mapping[str, StoredTensor], out: Tensor) -> None:
    lead = len(shard.sizes) - len(stored[shard.sources[0].name].shape)
    grouped = out.flatten(0, lead).unflatten(0, (shard.groups, -1))
    start = 0
    for source in shard.sources:
        rows = source.rows // shard.groups
        stored[source.name].read_into(grouped[:, start : start + rows], source.row, source.column)
        start += rows


def _metadata(index: list[tuple[str, list[dict[str, Any]]]]) -> bytes:
    """Returns the checkpoint's index, pickled as by torch.distributed.checkpoint."""
    tensors: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for file, entries in index:
        for entry in entries:
            size, offset = torch.Size(entry["whole"]), torch.Size(entry["corner"])
            properties = TensorProperties(dtype=getattr(torch, entry["dtype"]))
            whole = tensors.setdefault(entry["key"], TensorStorageMetadata(properties, size, []))
            whole.chunks.append(ChunkStorageMetadata(offset, torch.Size(entry["sizes"])))
            places[MetadataIndex(entry["key"], offset)] = _StorageInfo(file, entry["begin"], entry["length"])
    stream = io.BytesIO()
    pickle.dump(Metadata(state_dict_metadata=dict(tensors), storage_data=places, planner_data={}), stream)
    return stream.getvalue()
