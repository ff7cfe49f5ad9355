"""Either form to Hugging Face: a checkpoint into safetensors, weight by weight, in one process."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_parallel_r1.architecture.weight_table import WeightMapping, weight_table
from megatron_parallel_r1.checkpoint_formats.hf_folder import SHARD_BYTES, shard_names
from megatron_parallel_r1.checkpoint_formats.safetensors_file import NAMES
from megatron_parallel_r1.conversion.checkpoint_source import Side, Slab, open_side
from megatron_parallel_r1.conversion.hashing_writer import Sink
from megatron_parallel_r1.conversion.prefetch import Rooms, loaded
from megatron_parallel_r1.conversion.to_megatron import Advance, copy_companions, source_identity
from megatron_parallel_r1.conversion.work_folder import Work
from megatron_parallel_r1.errors import UserError

SLAB_BYTES = 2**25  # read at once where a weight can be cut
INDEX = "model.safetensors.index.json"


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
    """Converts a checkpoint: of `hf_to_megatron`, of a run, or of Megatron-LM.

    Args:
        source: its folder.
        out, dtype, shard_bytes, replace, advance, begin: as in `write_hf`.
        like: a folder with the model's config.json and tokenizer; None: `source` has them.

    Raises:
        UserError: the source cannot be converted, before anything is written; or `out` cannot be written.
    """
    side = open_side(source, like, once=True)
    write_hf(side, out, dtype, shard_bytes, replace, {}, advance, begin)


def write_hf(
    side: Side,
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
        dtype: that all weights are cast to, None: as they are.
        shard_bytes: of one safetensors file at most, unless one weight is larger.
        replace: whether `out` may be there.
        extra: further files, and what replaces those that `side.like` has: name and content.
        begin: is told how many bytes will be written.
        advance: is told bytes as they are.

    Raises:
        UserError: `out` cannot be written.
    """
    if dtype not in (None, *NAMES):
        raise UserError(f"dtype {dtype} is not one of {', '.join(map(str, NAMES))}")
    weights = weight_table(side.shape)
    dtypes = {weight.name: dtype or side.dtype(weight) for weight in weights}
    files = _shards(weights, dtypes, shard_bytes)
    total = sum(_bytes(weight, dtypes) for weight in weights)
    begin(total)
    extra = dict(extra or {})
    extra.setdefault("config.json", _config(side, set(dtypes.values())))
    identity = {
        "to": "hf",
        "dtype": str(dtype),
        "shard_bytes": shard_bytes,
        "source": source_identity(side.weights_folder, out),
        "like": source_identity(side.like, out),
        "extra": {name: content.hex() for name, content in extra.items() if len(content) < 2**16},
    }
    names, rooms = shard_names(len(files)), Rooms()

    def writer(some: list[WeightMapping]) -> Callable[[Sink], None]:
        return lambda sink: _write(sink, some, side, dtypes, rooms, advance)

    with Work(out, identity, replace) as work:
        work.files([(name, writer(some)) for name, some in zip(names, files, strict=True)])
        if len(names) > 1:
            places = {
                part: name
                for name, some in zip(names, files, strict=True)
                for weight in some
                for part, _ in weight.parts
            }
            told = json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2)
            work.file(INDEX, lambda sink: sink.write(told.encode() + b"\n"))
        for name, content in extra.items():
            work.file(name, lambda sink, content=content: sink.write(content))
        copy_companions(side.like, work, but=tuple(extra))
        work.complete()


def _config(side: Side, kinds: set[torch.dtype]) -> bytes:
    config = side.config | {"vocab_size": side.shape.vocab}
    if len(kinds) == 1:
        name = str(kinds.pop()).removeprefix("torch.")
        config |= {key: name for key in ("torch_dtype", "dtype") if key in config}
    return json.dumps(config, indent=2).encode() + b"\n"


def _bytes(weight: WeightMapping, dtypes: Mapping[str, torch.dtype]) -> int:
    return torch.Size(weight.shape).numel() * dtypes[weight.name].itemsize


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
    sink: Sink,
    weights: list[WeightMapping],
    side: Side,
    dtypes: Mapping[str, torch.dtype],
    rooms: Rooms,
    advance: Advance,
) -> None:
    """Writes a safetensors file: its header, then the tensors in the order that the header says."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for weight in weights:
        for name, sizes in weight.parts:
            begin, end = end, end + torch.Size(sizes).numel() * dtypes[weight.name].itemsize
            header[name] = {
                "dtype": NAMES[dtypes[weight.name]],
                "shape": list(sizes),
                "data_offsets": [begin, end],
            }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sink.write(len(text).to_bytes(8, "little") + text)

    slabs = [slab for weight in weights for slab in Slab.of(weight, _rows(weight, dtypes))]
    for slab, parts in loaded(slabs, side.parts, side.bytes_of, rooms):
        for part in parts:
            for rows in _in_blocks(part):
                block = rows.to(dtypes[slab.weight.name]).contiguous()
                sink.write(block.view(-1).view(torch.uint8).numpy())
                advance(block.nbytes)
        del parts, part, rows, block


def _rows(weight: WeightMapping, dtypes: Mapping[str, torch.dtype]) -> int:
    """Of a slab of about `SLAB_BYTES`."""
    return max(1, SLAB_BYTES * weight.shape[0] // max(_bytes(weight, dtypes), 1))


def _in_blocks(part: Tensor, size: int = 2**24) -> list[Tensor]:
    """A part's rows in order, in pieces that may be cast or copied one at a time."""
    dim = 0 if len(part) > 1 else 1
    each = max(1, size * part.shape[dim] // max(part.nbytes, 1))
    return list(part.split(each, dim))
