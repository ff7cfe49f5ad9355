"""A model on disk in either format, read weight by weight under its Hugging Face names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.architecture.weight_table import EMBEDDING, WeightMapping
from megatron_parallel_r1.checkpoint_formats.hf_folder import read_config, stored_weights
from megatron_parallel_r1.checkpoint_formats.safetensors_file import StoredTensor
from megatron_parallel_r1.checkpoint_formats.torch_dist import MegatronCheckpoint, find_checkpoint
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.train.checkpoints.manifest import MANIFEST


@dataclass(frozen=True, slots=True)
class WeightSlice:
    """A weight, or some rows of one that is a single Hugging Face tensor."""

    weight: WeightMapping
    start: int
    stop: int

    @classmethod
    def whole(cls, weight: WeightMapping) -> WeightSlice:
        return cls(weight, 0, weight.shape[0])

    @classmethod
    def split(cls, weight: WeightMapping, count: int) -> list[WeightSlice]:
        """Splits a weight into slices of `count` rows, if it can be split."""
        if weight.groups > 1 or len(weight.parts) > 1:
            return [cls.whole(weight)]
        rows = weight.shape[0]
        return [cls(weight, start, min(start + count, rows)) for start in range(0, rows, count)]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of its part of each Hugging Face tensor."""
        if len(self.weight.parts) > 1:
            return [shape for _, shape in self.weight.parts]
        return [(self.stop - self.start, *self.weight.shape[1:])]


@dataclass(frozen=True, slots=True)
class CheckpointSource:
    """A model whose weights fit its config.json.

    Attributes:
        path: the folder that the user gave.
        config: the model's sizes.
        config_json: the parsed config.json.
        like: the folder with config.json and tokenizer.
        stored: the tensors of a Hugging Face folder; empty for Megatron.
        checkpoint: the Megatron checkpoint; None for Hugging Face.
    """

    path: Path
    config: ModelConfig
    config_json: dict[str, Any]
    like: Path
    stored: Mapping[str, StoredTensor] = field(default_factory=dict)
    checkpoint: MegatronCheckpoint | None = None

    @property
    def weights_folder(self) -> Path:
        """The folder with the weight files."""
        return self.checkpoint.folder if self.checkpoint else self.path

    def dtypes(self, weight: WeightMapping) -> dict[str, torch.dtype]:
        """Returns the dtype of each Hugging Face tensor of a weight."""
        if self.checkpoint:
            return dict.fromkeys(
                (name for name, _ in weight.parts), self.checkpoint.dtype(weight, self.config)
            )
        return {name: self.stored[name].dtype for name, _ in weight.parts}

    def bytes_of(self, part: WeightSlice) -> int:
        """Returns a slice's size in bytes, in its stored dtype."""
        dtypes = self.dtypes(part.weight).values()
        return sum(prod(shape) * dtype.itemsize for shape, dtype in zip(part.shapes, dtypes, strict=True))

    def parts(self, part: WeightSlice) -> list[Tensor]:
        """Reads a slice's part of each Hugging Face tensor, [groups, rows of a group, …]: the first two
        dimensions together are rows.
        """
        if self.checkpoint:
            return part.weight.views(self.checkpoint.read(part.weight, self.config, part.start, part.stop))
        tensors = []
        for (name, _), shape in zip(part.weight.parts, part.shapes, strict=True):
            stored = self.stored[name]
            tensor_1rX = torch.empty((1, *shape), dtype=stored.dtype)
            stored.read_into(tensor_1rX, part.start)
            tensors.append(tensor_1rX)
        return tensors


def open_source(path: Path, like: Path | None = None) -> CheckpointSource:
    """Opens a Hugging Face folder or a Megatron checkpoint, and checks its weights against its config.json.

    Args:
        like: the folder with config.json and tokenizer; None: `path`.

    Raises:
        UserError: `path` is neither, or its weights do not fit.
    """
    like = like or path
    is_megatron = not any(path.glob("*.safetensors")) and find_checkpoint(path) is not None
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give a Hugging Face model or a Megatron checkpoint")
    if is_megatron and not (like / "config.json").is_file():
        raise UserError(
            f"{like}: no config.json; give with --like the Hugging Face folder with the model's config and "
            "tokenizer"
        )
    config = read_config(like)
    config_json = json.loads((like / "config.json").read_text())
    if is_megatron:
        checkpoint = MegatronCheckpoint(path)
        config = _with_tags(config, checkpoint)
        checkpoint.check(config)
        return CheckpointSource(path, config, config_json, like, checkpoint=checkpoint)
    return CheckpointSource(path, config, config_json, like, stored=stored_weights(path, config))


def _with_tags(config: ModelConfig, checkpoint: MegatronCheckpoint) -> ModelConfig:
    """Takes the vocabulary of a run's checkpoint, which has rows for the tags and no padding."""
    rows = checkpoint.sizes.get(EMBEDDING, (0,))[0]
    is_own = (checkpoint.folder / MANIFEST).is_file()
    return replace(config, vocab=rows) if is_own and rows > config.vocab else config
