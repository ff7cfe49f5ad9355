"""Reads weights from Megatron's distributed checkpoints ("torch_dist"), without Megatron or its ranks.

Such a checkpoint stores whole tensors in shards, independent of the layout that wrote it. Their names are
those of Megatron's modules, except for norms that Transformer Engine fuses into the next matrix, and experts,
which are stacked along a new first dimension. Megatron-LM may also stack all layers that way.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.architecture.weight_table import WeightMapping, weight_table
from megatron_parallel_r1.checkpoint_formats.safetensors_file import StoredTensor
from megatron_parallel_r1.checkpoint_formats.torch_save import NotContiguous, locate_tensor
from megatron_parallel_r1.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"
# Prefixes of a training run's other tensors.
_NOT_WEIGHTS = ("optimizer.", "rng_state", "rerun_state", "opt_param_scheduler", "chained_")


def checkpoint_key(weight: WeightMapping, has_experts: bool) -> str:
    """Returns the name of the tensor that `weight` is, or of which it is row `weight.expert`.

    Args:
        has_experts: whether the model has experts; the norm before a router is not fused.
    """
    name = weight.name.replace(".input_layernorm.", ".self_attention.linear_qkv.layer_norm_")
    if not has_experts:
        name = name.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")
    if weight.expert is not None:
        name = name.replace(f".local_experts.{weight.expert}.", ".experts.")
    return name


def _places(weight: WeightMapping, has_experts: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields where a checkpoint may store a weight: the name of a tensor, and the leading indices."""
    expert = () if weight.expert is None else (weight.expert,)
    for name in (checkpoint_key(weight, has_experts), weight.name):
        yield name, expert
        if weight.layer is not None:
            yield name.replace(f".layers.{weight.layer}.", ".layers.", 1), (weight.layer, *expert)


def find_checkpoint(path: Path) -> Path | None:
    """Returns the folder with the shards: `path`, or the one its tracker names; None if there is none."""
    if (path / ".metadata").is_file():
        return path
    tracker = path / TRACKER
    if not tracker.is_file():
        return None
    iteration = tracker.read_text().strip()
    folder = path / (f"iter_{int(iteration):07d}" if iteration.isdigit() else iteration)
    if not (folder / ".metadata").is_file():
        raise UserError(
            f"{tracker} names {folder.name}, which is not a distributed checkpoint; copy it again"
        )
    return folder


@dataclass(frozen=True, slots=True)
class StoredShard:
    """A rectangle of a tensor: its place in a file, and in the whole tensor."""

    file: Path
    begin: int
    length: int
    offset: tuple[int, ...]
    sizes: tuple[int, ...]


class MegatronCheckpoint:
    """A distributed checkpoint, its index in memory.

    Attributes:
        folder: with the shards.
        sizes: of all its tensors.
        dtypes: of all its tensors.

    Raises:
        UserError: there is no checkpoint in `path`, or its index is damaged.
    """

    def __init__(self, path: Path) -> None:
        folder = find_checkpoint(path)
        if folder is None:
            raise UserError(
                f"{path}: no distributed checkpoint of Megatron (.metadata is missing); give its folder. "
                "A legacy one (mp_rank_…) must be saved again with --ckpt-format torch_dist"
            )
        self.folder = folder
        try:
            self._metadata: Metadata = FileSystemReader(folder).read_metadata()
        except (pickle.UnpicklingError, EOFError, AttributeError, OSError, ImportError) as error:
            raise UserError(f"{folder}/.metadata is damaged ({error}); copy it again") from None
        self._tensors: dict[str, TensorStorageMetadata] = {
            key: metadata
            for key, metadata in self._metadata.state_dict_metadata.items()
            if isinstance(metadata, TensorStorageMetadata)
        }
        self.sizes: Mapping[str, tuple[int, ...]] = {key: tuple(t.size) for key, t in self._tensors.items()}
        self.dtypes: Mapping[str, torch.dtype] = {key: t.properties.dtype for key, t in self._tensors.items()}

    @property
    def weight_keys(self) -> set[str]:
        """Names of the tensors that are weights of a model."""
        return {
            key for key in self.sizes if not key.startswith(_NOT_WEIGHTS) and not key.endswith("_extra_state")
        }

    def check(self, config: ModelConfig) -> None:
        """Checks names and sizes against a model.

        Raises:
            UserError: a tensor is missing, unknown or of another size.
        """
        problems, used = [], set()
        for weight in weight_table(config):
            location = self._locate(weight, config)
            if location is None:
                problems.append(f"{checkpoint_key(weight, config.experts is not None)} is missing")
                continue
            key, index = location
            used.add(key)
            size = self.sizes[key][len(index) :]
            fits = size == weight.shape
            if weight.vocabulary:  # padded by the writer
                fits = size[1:] == weight.shape[1:] and size[0] >= weight.shape[0]
            if not fits:
                problems.append(f"{key} is {self.sizes[key]} instead of {weight.shape}")
        problems += [f"{key} is unknown" for key in self.weight_keys - used]
        if problems:
            first = "; ".join(sorted(problems)[:5])
            more = f"; and {len(problems) - 5} more" if problems[5:] else ""
            raise UserError(
                f"{self.folder} does not fit the model: {first}{more}. Give the config.json of this model"
            )

    def dtype(self, weight: WeightMapping, config: ModelConfig) -> torch.dtype:
        """Returns the dtype of a weight; `check` must have passed."""
        return self.dtypes[self._location(weight, config)[0]]

    @torch.no_grad()
    def read(
        self,
        weight: WeightMapping,
        config: ModelConfig,
        start: int = 0,
        stop: int | None = None,
    ) -> Tensor:
        """Reads a Megatron parameter, without the padding of its vocabulary.

        Args:
            start, stop: the rows to read; None: to the last.

        Raises:
            UserError: a shard cannot be read, or one is missing.
        """
        key, index = self._location(weight, config)
        stop = weight.shape[0] if stop is None else stop
        out = torch.empty((stop - start, *weight.shape[1:]), dtype=self.dtypes[key])
        filled = 0
        for shard in self.shards(key):
            lead = tuple(zip(shard.offset, shard.sizes, strict=True))[: len(index)]
            if not all(first <= i < first + size for i, (first, size) in zip(index, lead, strict=True)):
                continue
            (top, *left), (rows, *widths) = shard.offset[len(index) :], shard.sizes[len(index) :]
            first, last = max(start, top), min(stop, top + rows)
            if first >= last:
                continue
            columns = (slice(begin, begin + width) for begin, width in zip(left, widths, strict=True))
            target = out[(slice(first - start, last - start), *columns)]
            above = 0
            for i, (begin, size) in zip(index, lead, strict=True):
                above = above * size + i - begin
            self._read_into(target, key, shard, (rows, *widths), above * rows + first - top)
            filled += target.numel()
        if filled != out.numel():
            raise UserError(f"{self.folder}: shards of {key} are missing; copy the checkpoint again")
        return out

    def shards(self, key: str) -> list[StoredShard]:
        """Returns the shards of a tensor."""
        shards = []
        for chunk in self._tensors[key].chunks:
            storage = self._metadata.storage_data[MetadataIndex(key, chunk.offsets)]
            if getattr(storage, "transform_descriptors", None):
                raise UserError(f"{self.folder}: {key} is stored transformed; save it without extensions")
            shards.append(
                StoredShard(
                    self.folder / storage.relative_path,
                    storage.offset,
                    storage.length,
                    tuple(chunk.offsets),
                    tuple(chunk.sizes),
                )
            )
        return shards

    def _read_into(
        self, target: Tensor, key: str, shard: StoredShard, sizes: tuple[int, ...], row: int
    ) -> None:
        """Fills `target` with the rows from `row` on of the tensors of `sizes` that a shard stores."""
        if not target.numel():
            return
        try:
            with shard.file.open("rb") as stream:
                if shard.file.stat().st_size < shard.begin + shard.length:
                    raise UserError(f"{shard.file} ends within {key}; copy it again")
                saved = locate_tensor(stream, shard.begin, shard.length)
        except OSError as error:
            raise UserError(f"{shard.file} cannot be read ({error.strerror}); copy it again") from None
        except NotContiguous as error:
            raise UserError(f"{shard.file}: {key} is not contiguous ({error}); save a copy") from None
        except (pickle.UnpicklingError, zipfile.BadZipFile) as error:
            raise UserError(f"{shard.file}: {key} is damaged ({error}); copy it again") from None
        if prod(saved.shape) != prod(shard.sizes):
            raise UserError(f"{shard.file}: {key} is of sizes {saved.shape} instead of {shard.sizes}")
        rows, rest = sizes[0], sizes[1:]
        count = prod(shard.sizes) // prod(sizes)
        stored = StoredTensor(shard.file, key, saved.dtype, (count * rows, *rest), saved.begin)
        stored.read_into(target[None], row)

    def _location(self, weight: WeightMapping, config: ModelConfig) -> tuple[str, tuple[int, ...]]:
        location = self._locate(weight, config)
        if location is None:
            raise UserError(f"{self.folder}: {weight.name} is missing; copy the checkpoint again")
        return location

    def _locate(self, weight: WeightMapping, config: ModelConfig) -> tuple[str, tuple[int, ...]] | None:
        places = _places(weight, config.experts is not None)
        return next(((key, index) for key, index in places if key in self.sizes), None)


def read_weights(checkpoint: MegatronCheckpoint, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Yields all weights under their Hugging Face names."""
    for weight in weight_table(config):
        yield from zip(
            (name for name, _ in weight.parts), weight.split([checkpoint.read(weight, config)]), strict=True
        )
