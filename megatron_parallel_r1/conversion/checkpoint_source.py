"""A model on disk in either form, read weight by weight under its Hugging Face names."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.architecture.weight_table import EMBEDDING, WeightMapping, check_fit
from megatron_parallel_r1.checkpoint_formats.hf_folder import read_config, weight_files
from megatron_parallel_r1.checkpoint_formats.safetensors_file import StoredTensor, stored_tensors
from megatron_parallel_r1.checkpoint_formats.torch_dist import MegatronCheckpoint, find_checkpoint
from megatron_parallel_r1.conversion.prefetch import tensor_in
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.train.checkpoints.manifest import MANIFEST


@dataclass(frozen=True, slots=True)
class Slab:
    """A weight, or rows of one that is a Hugging Face tensor as it is."""

    weight: WeightMapping
    start: int
    stop: int

    @classmethod
    def whole(cls, weight: WeightMapping) -> Slab:
        return cls(weight, 0, weight.shape[0])

    @classmethod
    def of(cls, weight: WeightMapping, count: int) -> list[Slab]:
        """All of a weight, of `count` rows each where it can be cut."""
        if weight.groups > 1 or len(weight.parts) > 1:
            return [cls.whole(weight)]
        rows = weight.shape[0]
        return [cls(weight, start, min(start + count, rows)) for start in range(0, rows, count)]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of what it has of each Hugging Face tensor."""
        if len(self.weight.parts) > 1:
            return [shape for _, shape in self.weight.parts]
        return [(self.stop - self.start, *self.weight.shape[1:])]


@dataclass(frozen=True, slots=True)
class Side:
    """A checked model.

    Attributes:
        path: as the user gave it.
        shape: the architecture.
        config: its config.json, word by word.
        like: the folder where that lies, and the tokenizer.
        stored: of a Hugging Face folder, its tensors; None in the other form.
        checkpoint: of a Megatron checkpoint; None in the other form.
    """

    path: Path
    shape: ModelConfig
    config: dict[str, Any]
    like: Path
    stored: dict[str, StoredTensor] | None = None
    checkpoint: MegatronCheckpoint | None = None

    @property
    def weights_folder(self) -> Path:
        """Where the weights' files are."""
        return self.checkpoint.folder if self.checkpoint else self.path

    def dtype(self, weight: WeightMapping) -> torch.dtype:
        """Of a weight's first part."""
        if self.checkpoint:
            return self.checkpoint.dtype(weight, self.shape)
        return self.stored[weight.parts[0][0]].dtype

    def bytes_of(self, slab: Slab) -> int:
        """As it is stored."""
        if self.checkpoint:
            return sum(map(prod, slab.shapes)) * self.dtype(slab.weight).itemsize
        dtypes = (self.stored[name].dtype for name, _ in slab.weight.parts)
        return sum(prod(shape) * dtype.itemsize for shape, dtype in zip(slab.shapes, dtypes, strict=True))

    def parts(self, slab: Slab, memory: bytearray | None = None) -> list[Tensor]:
        """What a slab has of the Hugging Face tensors that its weight is made of, each [groups, rows of a
        group, …]: the first two dimensions together are rows.

        Args:
            memory: `bytes_of` bytes, that they are read into; None for fresh memory.
        """
        memory = bytearray(self.bytes_of(slab)) if memory is None else memory
        if self.checkpoint:
            empty = partial(tensor_in, memory)
            read = self.checkpoint.read(slab.weight, self.shape, empty, slab.start, slab.stop)
            return slab.weight.views(read)
        parts, begin = [], 0
        for (name, _), shape in zip(slab.weight.parts, slab.shapes, strict=True):
            stored = self.stored[name]
            out = tensor_in(memoryview(memory)[begin:], shape, stored.dtype)[None]
            stored.read_into(out, slab.start)
            parts.append(out)
            begin += out.nbytes
        return parts


def open_side(path: Path, like: Path | None = None, once: bool = False) -> Side:
    """Opens a Hugging Face folder or a Megatron checkpoint, and checks that its weights fit its config.json.

    Args:
        like: the folder with config.json and tokenizer, None: `path` has them.
        once: whether nobody will read its weights soon again; see `FileBytes`.

    Raises:
        UserError: it is neither, or does not fit.
    """
    like = like or path
    is_megatron = not any(path.glob("*.safetensors")) and find_checkpoint(path) is not None
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give that of a Hugging Face model or a Megatron checkpoint")
    if is_megatron and not (like / "config.json").is_file():
        raise UserError(
            f"{like}: no config.json; say with --like which Hugging Face folder has the model's config and "
            "tokenizer"
        )
    shape = read_config(like)
    config = json.loads((like / "config.json").read_text())
    if is_megatron:
        checkpoint = MegatronCheckpoint(path, once=once)
        shape = _grown(shape, checkpoint)
        checkpoint.check(shape)
        return Side(path, shape, config, like, checkpoint=checkpoint)
    stored = stored_tensors(weight_files(path), once=once)
    check_fit(shape, {name: tensor.shape for name, tensor in stored.items()})
    return Side(path, shape, config, like, stored=stored)


def _grown(shape: ModelConfig, checkpoint: MegatronCheckpoint) -> ModelConfig:
    """The shape with the vocabulary of a run's checkpoint: it has rows for the tags and no padding."""
    rows = checkpoint.sizes.get(EMBEDDING, (0,))[0]
    is_ours = (checkpoint.folder / MANIFEST).is_file()
    return replace(shape, vocab=rows) if is_ours and rows > shape.vocab else shape
