"""A family's table filled in for one model: each parameter, what it is made of, and how ranks share it.

Megatron fuses what it multiplies together. Its QKV weight holds, for each key/value head, the rows of the
queries that share it, then of the key, then of the value; its first MLP weight holds gate, then up. So a
Megatron tensor is the Hugging Face tensors cut into equal groups of rows, and those dealt out in turn.
Imports no Megatron: conversion needs none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_parallel_r1.architecture import families
from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.errors import UserError

EMBEDDING = families.EMBEDDING.ours
HEAD = families.HEAD.ours


@dataclass(frozen=True, slots=True)
class Weight:
    """One Megatron parameter.

    Attributes:
        name: in a whole, unsplit GPTModel.
        parts: name and shape of the Hugging Face tensors that it is made of.
        groups: into how many groups of rows each of them is cut.
        cut: the dimension along which tensor parallelism splits it; None: every rank has all of it.
        vocabulary: whether its rows are tokens, filled up with zeros where the ranks do not divide them.
        layer, expert: which it is of, counted from 0; None: of none.
    """

    name: str
    parts: tuple[tuple[str, tuple[int, ...]], ...]
    groups: int = 1
    cut: int | None = None
    vocabulary: bool = False
    layer: int | None = None
    expert: int | None = None

    def join(self, tensors: list[Tensor], rank: int = 0, size: int = 1) -> Tensor:
        """Hugging Face tensors to the Megatron parameter of a tensor-parallel rank."""
        if self.vocabulary:
            tensors = [F.pad(tensor, (0, 0, 0, -len(tensor) % size)) for tensor in tensors]
        if self.cut == 0:
            tensors = [tensor.chunk(size)[rank] for tensor in tensors]
        groups = self.groups_of(size)
        whole = torch.cat([tensor.unflatten(0, (groups, -1)) for tensor in tensors], 1).flatten(0, 1)
        return whole.chunk(size, 1)[rank] if self.cut == 1 else whole

    def split(self, shards: list[Tensor]) -> list[Tensor]:
        """The Megatron parameters of all tensor-parallel ranks to Hugging Face tensors."""
        if self.vocabulary:
            return [torch.cat(shards)[: self.parts[0][1][0]]]
        if self.cut == 1:
            shards = [torch.cat(shards, 1)]
        if self.cut is None:
            shards = shards[:1]
        size = len(shards)
        groups = self.groups_of(size)
        rows = [shape[0] // size // groups for _name, shape in self.parts]
        cut = [shard.unflatten(0, (groups, -1)).split(rows, 1) for shard in shards]
        return [torch.cat([part.flatten(0, 1) for part in same]) for same in zip(*cut, strict=True)]

    def views(self, whole: Tensor, size: int = 1) -> list[Tensor]:
        """Where the parts lie in the parameter of one of `size` tensor-parallel ranks: views of it
        [groups, rows of a group, …], whose first two dimensions are the rows of a part."""
        groups = self.groups_of(size)
        rows = [shape[0] for _, shape in self.parts]
        grouped = whole.unflatten(0, (groups, -1))
        total = grouped.shape[1]
        return list(grouped.split([total * part // sum(rows) for part in rows], 1))

    def shard_shape(self, size: int) -> tuple[int, ...]:
        """Of the Megatron parameter of one of `size` tensor-parallel ranks."""
        rows, *rest = self.shape
        sizes = [padded_vocab(rows, size) if self.vocabulary else rows, *rest]
        if self.cut is not None:
            sizes[self.cut] //= size
        return tuple(sizes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole Megatron parameter, its vocabulary not filled up."""
        return (sum(shape[0] for _, shape in self.parts), *self.parts[0][1][1:])

    def groups_of(self, size: int) -> int:
        """How many of the groups one of `size` tensor-parallel ranks has."""
        return max(1, self.groups // size) if self.cut == 0 else self.groups


def padded_vocab(vocab: int, tensor: int) -> int:
    """Rows of an embedding that a tensor group shares evenly; those beyond `vocab` mean nothing."""
    return vocab + -vocab % tensor


def table(shape: ModelConfig) -> list[Weight]:
    """Every parameter of the model, in the order of a forward pass."""
    return list(_table(shape))


@lru_cache(maxsize=8)
def _table(shape: ModelConfig) -> tuple[Weight, ...]:
    family = families.FAMILIES[shape.family]
    experts = range(shape.experts.count if shape.experts else 0)
    sizes = {
        "hidden": shape.hidden,
        "ffn": shape.ffn,
        "head_dim": shape.head_dim,
        "query": shape.heads * shape.head_dim,
        "key": shape.kv_heads * shape.head_dim,
        "kv_heads": shape.kv_heads,
        "vocab": shape.vocab,
        "experts": len(experts),
        "expert_ffn": shape.experts.ffn if shape.experts else 0,
    }

    def filled(row: families.Row, layer: int | None = None, expert: int | None = None) -> Weight:
        return Weight(
            row.ours.format(layer=layer, expert=expert),
            tuple(
                (name.format(layer=layer, expert=expert), tuple(sizes[word] for word in words.split()))
                for name, words in row.theirs
            ),
            groups=sizes[row.groups] if row.groups else 1,
            cut=row.cut,
            vocabulary=row.vocabulary,
            layer=layer,
            expert=expert,
        )

    def of_layer(layer: int) -> Iterator[Weight]:
        for row in family.layer:
            if "{expert}" not in row.ours:
                yield filled(row, layer)
        for expert in experts:
            for row in family.layer:
                if "{expert}" in row.ours:
                    yield filled(row, layer, expert)

    return (
        filled(families.EMBEDDING),
        *(weight for layer in range(shape.layers) for weight in of_layer(layer)),
        filled(families.FINAL_NORM),
        *(() if shape.tied else (filled(families.HEAD),)),
    )


def check_fit(shape: ModelConfig, sizes: Mapping[str, tuple[int, ...]]) -> None:
    """Holds the names and sizes of Hugging Face tensors against the model that they are for.

    Some released checkpoints of tied models carry a copy of the embedding as lm_head; it is ignored, as
    transformers does. So are the rotary frequencies that old Llama checkpoints carry.

    Raises:
        UserError: a tensor is missing, unknown or of another size.
    """
    wanted = dict(part for weight in table(shape) for part in weight.parts)
    given = {
        name
        for name in sizes
        if not (shape.tied and name == "lm_head.weight") and not name.endswith(".rotary_emb.inv_freq")
    }
    problems = [f"{name} is missing" for name in wanted.keys() - given]
    problems += [f"{name} is unknown" for name in given - wanted.keys()]
    problems += [
        f"{name} is {tuple(sizes[name])} instead of {wanted[name]}"
        for name in wanted.keys() & given
        if tuple(sizes[name]) != wanted[name]
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:5]) + (f"; and {len(problems) - 5} more" if problems[5:] else "")
        raise UserError(
            f"weights do not fit the model: {shown}. Use the weights that belong to its config.json"
        )
