"""The weight table of one model: each Megatron parameter, its Hugging Face tensors, and its tensor split.

Megatron fuses matrices that share an input. Its QKV weight holds, for each key/value head, the rows of the
queries that share it, then of the key, then of the value; its first MLP weight holds gate, then up. So a
Megatron tensor is the Hugging Face tensors cut into equal groups of rows, and the groups interleaved.
Imports no Megatron: conversion needs none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_parallel_r1.architecture import families
from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.errors import UserError

EMBEDDING = families.EMBEDDING.megatron
HEAD = families.HEAD.megatron


@dataclass(frozen=True, slots=True)
class WeightMapping:
    """One Megatron parameter and the Hugging Face tensors that it consists of.

    Attributes:
        name: in a whole GPTModel.
        parts: name and shape of each Hugging Face tensor.
        groups: number of row groups that each of them is cut into.
        split_dim: the dimension that tensor parallelism splits; None: replicated.
        vocabulary: whether its rows are tokens, zero-padded to a multiple of the tensor-parallel size.
        layer, expert: indices from 0; None outside layers and experts.
    """

    name: str
    parts: tuple[tuple[str, tuple[int, ...]], ...]
    groups: int = 1
    split_dim: int | None = None
    vocabulary: bool = False
    layer: int | None = None
    expert: int | None = None

    def join(self, tensors: list[Tensor], rank: int = 0, size: int = 1) -> Tensor:
        """Fuses Hugging Face tensors into the Megatron parameter of one tensor-parallel rank."""
        if self.vocabulary:
            tensors = [F.pad(tensor, (0, 0, 0, -len(tensor) % size)) for tensor in tensors]
        if self.split_dim == 0:
            tensors = [tensor.chunk(size)[rank] for tensor in tensors]
        groups = self.groups_of(size)
        whole = torch.cat([tensor.unflatten(0, (groups, -1)) for tensor in tensors], 1).flatten(0, 1)
        return whole.chunk(size, 1)[rank] if self.split_dim == 1 else whole

    def split(self, shards: list[Tensor]) -> list[Tensor]:
        """Splits the Megatron parameters of all tensor-parallel ranks into Hugging Face tensors."""
        if self.vocabulary:
            return [torch.cat(shards)[: self.parts[0][1][0]]]
        if self.split_dim == 1:
            shards = [torch.cat(shards, 1)]
        if self.split_dim is None:
            shards = shards[:1]
        size = len(shards)
        groups = self.groups_of(size)
        rows = [shape[0] // size // groups for _name, shape in self.parts]
        blocks = [shard.unflatten(0, (groups, -1)).split(rows, 1) for shard in shards]
        return [torch.cat([part.flatten(0, 1) for part in same]) for same in zip(*blocks, strict=True)]

    def views(self, whole: Tensor, size: int = 1) -> list[Tensor]:
        """Returns the parts as views [groups, rows of a group, …] of the parameter of one of `size`
        tensor-parallel ranks; the first two dimensions together are a part's rows."""
        groups = self.groups_of(size)
        rows = [shape[0] for _, shape in self.parts]
        grouped = whole.unflatten(0, (groups, -1))
        total = grouped.shape[1]
        return list(grouped.split([total * part // sum(rows) for part in rows], 1))

    def shard_shape(self, size: int) -> tuple[int, ...]:
        """Returns the shape of the parameter on one of `size` tensor-parallel ranks."""
        rows, *rest = self.shape
        sizes = [padded_vocab(rows, size) if self.vocabulary else rows, *rest]
        if self.split_dim is not None:
            sizes[self.split_dim] //= size
        return tuple(sizes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole Megatron parameter, its vocabulary not padded."""
        return (sum(shape[0] for _, shape in self.parts), *self.parts[0][1][1:])

    def groups_of(self, size: int) -> int:
        """Returns how many of the groups one of `size` tensor-parallel ranks has."""
        return max(1, self.groups // size) if self.split_dim == 0 else self.groups


def padded_vocab(vocab: int, tensor: int) -> int:
    """Returns `vocab` rounded up to a multiple of the tensor-parallel size; the added rows are unused."""
    return vocab + -vocab % tensor


def weight_table(config: ModelConfig) -> list[WeightMapping]:
    """Returns every parameter of the model, in the order of a forward pass."""
    return list(_weight_table(config))


def parameter_count(config: ModelConfig) -> int:
    """Returns the number of the model's parameters; those of tied embeddings count once."""
    return sum(math.prod(size) for weight in weight_table(config) for _, size in weight.parts)


@lru_cache(maxsize=8)
def _weight_table(config: ModelConfig) -> tuple[WeightMapping, ...]:
    family = families.FAMILIES[config.family]
    experts = range(config.experts.count if config.experts else 0)
    sizes = {
        "hidden": config.hidden,
        "ffn": config.ffn,
        "head_dim": config.head_dim,
        "query": config.heads * config.head_dim,
        "key": config.kv_heads * config.head_dim,
        "kv_heads": config.kv_heads,
        "vocab": config.vocab,
        "experts": len(experts),
        "expert_ffn": config.experts.ffn if config.experts else 0,
    }

    def fill(
        template: families.WeightTemplate, layer: int | None = None, expert: int | None = None
    ) -> WeightMapping:
        return WeightMapping(
            template.megatron.format(layer=layer, expert=expert),
            tuple(
                (name.format(layer=layer, expert=expert), tuple(sizes[word] for word in words.split()))
                for name, words in template.hf
            ),
            groups=sizes[template.groups] if template.groups else 1,
            split_dim=template.split_dim,
            vocabulary=template.vocabulary,
            layer=layer,
            expert=expert,
        )

    def of_layer(layer: int) -> Iterator[WeightMapping]:
        for template in family.layer:
            if "{expert}" not in template.megatron:
                yield fill(template, layer)
        for expert in experts:
            for template in family.layer:
                if "{expert}" in template.megatron:
                    yield fill(template, layer, expert)

    return (
        fill(families.EMBEDDING),
        *(weight for layer in range(config.layers) for weight in of_layer(layer)),
        fill(families.FINAL_NORM),
        *(() if config.tied else (fill(families.HEAD),)),
    )


def check_fit(config: ModelConfig, sizes: Mapping[str, tuple[int, ...]]) -> None:
    """Checks the names and shapes of Hugging Face tensors against a model.

    Some released checkpoints of tied models contain a copy of the embedding as lm_head; it is ignored, as in
    transformers. So are the rotary frequencies in old Llama checkpoints.

    Raises:
        UserError: a tensor is missing, unknown or of another shape.
    """
    expected = dict(part for weight in weight_table(config) for part in weight.parts)
    names = {
        name
        for name in sizes
        if not (config.tied and name == "lm_head.weight") and not name.endswith(".rotary_emb.inv_freq")
    }
    problems = [f"{name} is missing" for name in expected.keys() - names]
    problems += [f"{name} is unknown" for name in names - expected.keys()]
    problems += [
        f"{name} is {tuple(sizes[name])} instead of {expected[name]}"
        for name in expected.keys() & names
        if tuple(sizes[name]) != expected[name]
    ]
    if problems:
        first = "; ".join(sorted(problems)[:5]) + (f"; and {len(problems) - 5} more" if problems[5:] else "")
        raise UserError(
            f"weights do not fit the model: {first}. Use the weights that belong to its config.json"
        )
