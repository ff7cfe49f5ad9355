"""Converts a checkpoint of either format to a Hugging Face folder, weight by weight, in one process."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_parallel_r1.architecture.weight_table import WeightMapping, weight_table
from megatron_parallel_r1.checkpoint_formats.hf_folder import INDEX, SHARD_BYTES, shard_names
from megatron_parallel_r1.checkpoint_formats.safetensors_file import NAMES, cast_to
from megatron_parallel_r1.conversion.checkpoint_source import CheckpointSource, WeightSlice, open_source
from megatron_parallel_r1.conversion.hashing_writer import HashingWriter
from megatron_parallel_r1.conversion.to_megatron import Advance, copy_companions, source_identity
from megatron_parallel_r1.conversion.work_folder import MemoryBudget, WorkFolder
from megatron_parallel_r1.data.tokenizers import check_companion_tokenizer
from megatron_parallel_r1.errors import UserError

SLICE_BYTES = 2**25  # read at once if a weight can be split


def megatron_to_hf(
    source: Path,
    out: Path,
    like: Path | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    replace: bool = False,
    advance: Advance = lambda count: None,
    begin: Advance = lambda total: None,
) -> None:
    """Converts a checkpoint by `hf_to_megatron`, a run, or Megatron-LM.

    Args:
        source: its folder.
        out, dtype, shard_bytes, replace, advance, begin: as in `write_hf_folder`.
        like: a folder with the model's config.json and tokenizer; None: `source`.

    Raises:
        UserError: the source cannot be converted, before anything is written; or `out` cannot be written.
    """
    checkpoint = open_source(source, like)
    check_companion_tokenizer(checkpoint.like)
    write_hf_folder(checkpoint, out, dtype, shard_bytes, replace, {}, advance, begin)


def write_hf_folder(
    source: CheckpointSource,
    out: Path,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    replace: bool = False,
    extra: Mapping[str, bytes] | None = None,
    advance: Advance = lambda count: None,
    begin: Advance = lambda total: None,
) -> None:
    """Writes a model as a Hugging Face folder.

    Args:
        out: the new folder; it appears when it is complete.
        dtype: to cast all weights to; None: no cast.
        shard_bytes: most bytes of one safetensors file, unless one weight is larger.
        replace: whether `out` may exist.
        extra: further files by name, which take precedence over those in `source.like`.
        begin: called with the number of bytes that will be written.
        advance: called with the number of bytes after each write.

    Raises:
        UserError: `out` cannot be written.
    """
    if dtype not in (None, *NAMES):
        raise UserError(f"dtype {dtype} is not one of {', '.join(map(str, NAMES))}")
    weights = weight_table(source.config)
    dtypes = {name: dtype or stored for weight in weights for name, stored in source.dtypes(weight).items()}
    files = _shards(weights, dtypes, shard_bytes)
    total = sum(_bytes(weight, dtypes) for weight in weights)
    begin(total)
    extra = dict(extra or {})
    extra.setdefault("config.json", _config(source, set(dtypes.values())))
    identity = {
        "to": "hf",
        "dtype": str(dtype),
        "shard_bytes": shard_bytes,
        "source": source_identity(source.weights_folder, out),
        "like": source_identity(source.like, out),
        "extra": {name: content.hex() for name, content in extra.items() if len(content) < 2**16},
    }
    names, budget = shard_names(len(files)), MemoryBudget()

    def writer(shard: list[WeightMapping]) -> Callable[[HashingWriter], None]:
        return lambda file: _write(file, shard, source, dtypes, budget, advance)

    with WorkFolder(out, identity, replace) as work:
        work.files([(name, writer(shard)) for name, shard in zip(names, files, strict=True)])
        if len(names) > 1:
            places = {
                part: name
                for name, shard in zip(names, files, strict=True)
                for weight in shard
                for part, _ in weight.parts
            }
            index = json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2)
            work.file(INDEX, lambda file: file.write(index.encode() + b"\n"))
        for name, content in extra.items():
            work.file(name, partial(HashingWriter.write, data=content))
        copy_companions(source.like, work, exclude=tuple(extra))
        work.complete()


def _config(source: CheckpointSource, kinds: set[torch.dtype]) -> bytes:
    config = source.config_json | {"vocab_size": source.config.vocab}
    if len(kinds) == 1:
        name = str(kinds.pop()).removeprefix("torch.")
        config |= {key: name for key in ("torch_dtype", "dtype") if key in config}
    return json.dumps(config, indent=2).encode() + b"\n"


def _bytes(weight: WeightMapping, dtypes: Mapping[str, torch.dtype]) -> int:
    return sum(prod(shape) * dtypes[name].itemsize for name, shape in weight.parts)


def _shards(
    weights: list[WeightMapping], dtypes: Mapping[str, torch.dtype], shard_bytes: int
) -> list[list[WeightMapping]]:
    files: list[list[WeightMapping]] = [[]]
    size = 0
    for weight in weights:
        if files[-1] and size + _bytes(weight, dtypes) > shard_bytes:
            files.append([])
            size = 0
        files[-1].append(weight)
        size += _bytes(weight, dtypes)
    return files


def _write(
    file: HashingWriter,
    weights: list[WeightMapping],
    source: CheckpointSource,
    dtypes: Mapping[str, torch.dtype],
    budget: MemoryBudget,
    advance: Advance,
) -> None:
    """Writes a safetensors file: its header, then the tensors in the header's order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for weight in weights:
        for name, sizes in weight.parts:
            begin, end = end, end + prod(sizes) * dtypes[name].itemsize
            header[name] = {
                "dtype": NAMES[dtypes[name]],
                "shape": list(sizes),
                "data_offsets": [begin, end],
            }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)

    slices = [part for weight in weights for part in WeightSlice.split(weight, _rows(weight, dtypes))]
    for part in slices:
        with budget.reserve(source.bytes_of(part)):
            for (name, _), tensor in zip(part.weight.parts, source.parts(part), strict=True):
                for rows in _in_blocks(tensor):
                    block = cast_to(rows, dtypes[name], name).contiguous()
                    file.write(block.view(-1).view(torch.uint8).numpy())
                    advance(block.nbytes)
            del tensor, rows, block  # before another file takes their memory


def _rows(weight: WeightMapping, dtypes: Mapping[str, torch.dtype]) -> int:
    """Returns the rows of a slice of about `SLICE_BYTES`."""
    return max(1, SLICE_BYTES * weight.shape[0] // max(_bytes(weight, dtypes), 1))


def _in_blocks(tensor: Tensor, size: int = 2**24) -> list[Tensor]:
    """Splits a tensor's rows in order into blocks of about `size` bytes, to cast or copy one at a time."""
    dim = 0 if len(tensor) > 1 else 1
    count = max(1, size * tensor.shape[dim] // max(tensor.nbytes, 1))
    return list(tensor.split(count, dim))
