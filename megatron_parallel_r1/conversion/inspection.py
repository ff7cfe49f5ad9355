"""Describes a checkpoint from its index alone, and verifies the digests of its files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from math import prod
from pathlib import Path

from megatron_parallel_r1.architecture.weight_table import weight_table
from megatron_parallel_r1.checkpoint_formats.hf_folder import weight_files
from megatron_parallel_r1.checkpoint_formats.safetensors_file import stored_tensors
from megatron_parallel_r1.checkpoint_formats.torch_dist import MegatronCheckpoint, find_checkpoint
from megatron_parallel_r1.conversion.checkpoint_source import open_source
from megatron_parallel_r1.conversion.to_megatron import Advance
from megatron_parallel_r1.conversion.work_folder import SUMS
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.train.checkpoints.manifest import MANIFEST, Damaged, file_fault, read_manifest
from megatron_parallel_r1.utils.files import file_digest

StoredTensors = dict[str, tuple[str, tuple[int, ...]]]


def facts(path: Path, like: Path | None = None) -> Iterator[tuple[str, str]]:
    """Yields names and facts; of the architecture too if there is a config.json.

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
            yield "training", f"{others} tensors of an optimizer's state and others"
        tensors = {name: entry for name, entry in tensors.items() if name in weights}
    elements = sum(prod(shape) for _, shape in tensors.values())
    kinds = Counter(dtype for dtype, _ in tensors.values())
    yield "weights", f"{len(tensors)} tensors, {elements / 1e9:.3f} G elements"
    yield "dtypes", ", ".join(f"{dtype} ({count})" for dtype, count in kinds.most_common())
    if not ((like or path) / "config.json").is_file():
        yield "architecture", "unknown without a config.json; give --like"
        return
    try:
        config = open_source(path, like).config
    except UserError as error:
        yield "architecture", f"does not fit: {error}"
        return
    yield "architecture", f"{config.family}, {config.layers} layers, hidden {config.hidden}, ffn {config.ffn}"
    yield "attention", f"{config.heads} heads of {config.head_dim}, {config.kv_heads} for keys and values"
    if config.experts:
        yield "experts", f"{config.experts.count} of {config.experts.ffn}, {config.experts.per_token} a token"
    yield "vocabulary", f"{config.vocab}, embeddings {'tied' if config.tied else 'untied'}"
    scaling = f", {config.rope_scaling.kind} x {config.rope_scaling.factor:g}" if config.rope_scaling else ""
    yield "positions", f"{config.max_positions}, theta {config.rope_theta:g}{scaling}"
    parameters = sum(prod(weight.shape) for weight in weight_table(config))
    yield "fits", f"all weights of its config.json are present: {parameters / 1e6:.2f} M parameters"


def tensor_lines(path: Path) -> Iterator[str]:
    """Yields name, dtype and sizes of every tensor."""
    for name, (dtype, shape) in sorted(_tensors(path)[0].items()):
        yield f"{name}  {dtype}  {' x '.join(map(str, shape))}"


def _tensors(path: Path) -> tuple[StoredTensors, list[Path]]:
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give a checkpoint")
    if any(path.glob("*.safetensors")):
        files = weight_files(path)
        stored = stored_tensors(files).values()
        return {tensor.name: (_short(tensor.dtype), tensor.shape) for tensor in stored}, files
    checkpoint = MegatronCheckpoint(path)
    entries = {key: (_short(checkpoint.dtypes[key]), size) for key, size in checkpoint.sizes.items()}
    return entries, sorted(checkpoint.folder.glob("*.distcp"))


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def bytes_to_check(path: Path) -> int:
    """Returns the most bytes that `check_digests` reads."""
    folder = path if (path / SUMS).is_file() else find_checkpoint(path) or path
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def check_digests(path: Path, advance: Advance = lambda count: None) -> list[str]:
    """Verifies the files of a folder that was converted, released, or saved by a run; returns the faults.

    Args:
        advance: called with the number of bytes after each file.

    Raises:
        UserError: the folder has no recorded digests.
    """
    if (path / SUMS).is_file():
        return _by_sums(path, advance)
    checkpoint = find_checkpoint(path)
    if checkpoint is not None and (checkpoint / MANIFEST).is_file():
        return _by_manifest(checkpoint, advance)
    raise UserError(f"{path}: has neither {SUMS} nor {MANIFEST}; its files have no recorded digests")


def _by_manifest(checkpoint: Path, advance: Advance) -> list[str]:
    try:
        manifest = read_manifest(checkpoint)
    except Damaged as damage:
        return [str(damage)]
    faults = []
    for name, expected in sorted(manifest.files.items()):
        if why := file_fault(checkpoint / name, expected):
            faults.append(why)
        advance(expected.size)
    return faults


def _by_sums(path: Path, advance: Advance) -> list[str]:
    faults = []
    for line in (path / SUMS).read_text().splitlines():
        digest, _, name = line.partition("  ")
        file = path / name
        if not file.is_file():
            faults.append(f"{name} is missing")
            continue
        if file_digest(file).sha256 != digest:
            faults.append(f"{name} does not have its recorded digest")
        advance(file.stat().st_size)
    return faults
