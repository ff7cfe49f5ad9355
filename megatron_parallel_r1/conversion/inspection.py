"""What a checkpoint of either form holds, from its index alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from math import prod
from pathlib import Path

from megatron_parallel_r1.architecture.weight_table import weight_table
from megatron_parallel_r1.checkpoint_formats.hf_folder import weight_files
from megatron_parallel_r1.checkpoint_formats.safetensors_file import stored_tensors
from megatron_parallel_r1.checkpoint_formats.torch_dist import MegatronCheckpoint, find_checkpoint
from megatron_parallel_r1.conversion.checkpoint_source import open_side
from megatron_parallel_r1.errors import UserError

Tensors = dict[str, tuple[str, tuple[int, ...]]]


def facts(path: Path, like: Path | None = None) -> Iterator[tuple[str, str]]:
    """Names and facts; those of the architecture where a config.json tells it.

    Raises:
        UserError: there is no checkpoint in `path`.
    """
    tensors, files = _tensors(path)
    checkpoint = find_checkpoint(path) if not any(path.glob("*.safetensors")) else None
    yield "form", f"Megatron, distributed ({checkpoint.name})" if checkpoint else "Hugging Face"
    size = sum(file.stat().st_size for file in files)
    yield "files", f"{len(files)}, {size / 1e9:.3f} GB together"
    if checkpoint:
        weights = MegatronCheckpoint(path).weight_keys
        ranks = {file.name.split("_")[2] for file in files}
        yield "written by", f"{len(ranks)} rank(s)"
        if others := len(tensors.keys() - weights):
            yield "training", f"{others} tensors of an optimizer's state and the like"
        tensors = {name: told for name, told in tensors.items() if name in weights}
    numbers = sum(prod(shape) for _, shape in tensors.values())
    kinds = Counter(dtype for dtype, _ in tensors.values())
    yield "weights", f"{len(tensors)} tensors, {numbers / 1e9:.3f} G numbers"
    yield "dtypes", ", ".join(f"{dtype} ({count})" for dtype, count in kinds.most_common())
    if not ((like or path) / "config.json").is_file():
        yield "architecture", "unknown without a config.json; give --like"
        return
    try:
        shape = open_side(path, like).shape
    except UserError as error:
        yield "architecture", f"does not fit: {error}"
        return
    yield "architecture", f"{shape.family}, {shape.layers} layers, hidden {shape.hidden}, ffn {shape.ffn}"
    yield "attention", f"{shape.heads} heads of {shape.head_dim}, {shape.kv_heads} for keys and values"
    if shape.experts:
        yield "experts", f"{shape.experts.count} of {shape.experts.ffn}, {shape.experts.per_token} a token"
    yield "vocabulary", f"{shape.vocab}, embeddings {'tied' if shape.tied else 'untied'}"
    stretch = f", {shape.rope_scaling.kind} x {shape.rope_scaling.factor:g}" if shape.rope_scaling else ""
    yield "positions", f"{shape.max_positions}, theta {shape.rope_theta:g}{stretch}"
    parameters = sum(prod(weight.shape) for weight in weight_table(shape))
    yield "fits", f"all weights of its config.json are there: {parameters / 1e6:.2f} M parameters"


def tensor_lines(path: Path) -> Iterator[str]:
    """Name, dtype and sizes of every tensor."""
    for name, (dtype, shape) in sorted(_tensors(path)[0].items()):
        yield f"{name}  {dtype}  {' x '.join(map(str, shape))}"


def _tensors(path: Path) -> tuple[Tensors, list[Path]]:
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give that of a checkpoint")
    if any(path.glob("*.safetensors")):
        files = weight_files(path)
        stored = stored_tensors(files).values()
        return {one.name: (_short(one.dtype), one.shape) for one in stored}, files
    checkpoint = MegatronCheckpoint(path)
    told = {key: (_short(checkpoint.dtypes[key]), size) for key, size in checkpoint.sizes.items()}
    return told, sorted(checkpoint.folder.glob("*.distcp"))


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
