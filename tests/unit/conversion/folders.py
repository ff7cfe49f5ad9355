"""Folders to convert, and what is in them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from megatron_parallel_r1.conversion.shard_plan import Target
from tests.unit.model.family_models import VARIANTS, family_model

TARGETS = (Target(), Target(tensor=2, pipeline=2))


def targets(variant: str) -> tuple[Target, ...]:
    return (*TARGETS, *((Target(2, 2, 4), Target(expert=2)) if "moe" in variant else ()))


def write_hf(folder: Path, variant: str, shards: int = 1, **changes: object) -> PreTrainedModel:
    """A family's model as transformers saves it, in about so many shards."""
    assert variant in VARIANTS
    model = family_model(variant, **changes)
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=size if shards == 1 else int(size / shards * 1.05))
    return model


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """By safetensors' own reader."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        some = load_file(file)
        assert not some.keys() & found.keys()
        found |= some
    return found


def assert_equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys(), one.keys() ^ two.keys()
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype and torch.equal(tensor, two[name]), name
