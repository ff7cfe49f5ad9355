"""Compares two checkpoints of either format: every tensor bit for bit, and the logits.

Logits are computed by this package's model of each, loaded from a Megatron checkpoint by Megatron's own
loader, not by conversion's reader, and by transformers from the first Hugging Face folder.

Shapes: L tokens, V vocabulary.
"""

from __future__ import annotations

import warnings
from dataclasses import fields
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch import Tensor

from megatron_parallel_r1.architecture.weight_table import weight_table
from megatron_parallel_r1.checkpoint_formats.torch_dist import find_checkpoint
from megatron_parallel_r1.conversion.checkpoint_source import CheckpointSource, WeightSlice
from megatron_parallel_r1.conversion.to_megatron import Advance
from megatron_parallel_r1.errors import UserError, one_line
from megatron_parallel_r1.model.gpt import Model
from megatron_parallel_r1.utils.rounding import rounding_limits

LENGTH = 64


def compare_configs(first: CheckpointSource, second: CheckpointSource) -> list[str]:
    """Returns the fields of the configs that differ."""
    return [
        (f"{field.name} is {getattr(first.config, field.name)} and {getattr(second.config, field.name)}")
        for field in fields(first.config)
        if getattr(first.config, field.name) != getattr(second.config, field.name)
    ]


def compare_tensors(
    first: CheckpointSource, second: CheckpointSource, advance: Advance = lambda count: None
) -> list[str]:
    """Returns the tensors of two models of equal configs that are not bit-equal; `advance` counts them."""
    differences = []
    for weight in weight_table(first.config):
        whole = WeightSlice.whole(weight)
        parts = zip(weight.parts, first.parts(whole), second.parts(whole), strict=True)
        for (name, _), *pair in parts:
            a, b = (tensor.flatten(0, 1) for tensor in pair)
            if a.dtype != b.dtype:
                differences.append(f"{name} is {a.dtype} and {b.dtype}")
            elif not torch.equal(_bits(a), _bits(b)):
                gap = (a.double() - b.double()).abs().max()
                count = int((_bits(a) != _bits(b)).sum())
                differences.append(f"{name} differs in {count} of {a.numel()} elements, by {gap:.2g}")
            advance(1)
    return differences


def compare_logits(first: CheckpointSource, second: CheckpointSource) -> tuple[dict[str, float], list[str]]:
    """Returns the largest differences of float32 logits by comparison, and those that are too large."""
    from megatron_parallel_r1.distributed import process

    tokens_1L = torch.randint(0, first.config.vocab, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    with process.running(seed=0):
        first_LV = _own_logits(first, tokens_1L)
        gaps = {"our model of both": _largest(first_LV - _own_logits(second, tokens_1L))}
    for name, source in (("first", first), ("second", second)):
        if source.stored:
            gaps[f"our model of the first and transformers of the {name}"] = _largest(
                first_LV - _transformers_logits(source, tokens_1L)
            )
            break
    allowed = rounding_limits(["float32"], first.config.layers, _largest(first_LV)).largest
    failures = [
        (f"logits of {what} differ by {gap:.2g}, and float32 rounding explains {allowed:.2g}")
        for what, gap in gaps.items()
        if not gap <= allowed
    ]
    return gaps, failures


def _bits(tensor: Tensor) -> Tensor:
    sizes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(sizes[tensor.dtype.itemsize])


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item()


@torch.no_grad()
def _own_logits(source: CheckpointSource, tokens_1L: Tensor) -> Tensor:
    from megatron_parallel_r1.checkpoint_formats.hf_folder import load_hf_folder
    from megatron_parallel_r1.model.gpt import build_model, logits
    from megatron_parallel_r1.model.weights import load_hf_tensors

    model = build_model(source.config)
    if source.checkpoint:
        load_with_megatron(model, source.path)
    else:
        load_hf_tensors(model, load_hf_folder(source.path)[1])
    index_L = torch.arange(LENGTH)
    layout_KL = torch.stack([index_L, torch.zeros_like(index_L)]).int()
    device = next(model.parameters()).device
    row = (tokens_1L.to(device), index_L[None].to(device), layout_KL.to(device))
    return logits(model, *row)[0].cpu()


@torch.no_grad()
def _transformers_logits(source: CheckpointSource, tokens_1L: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.path, dtype=torch.float32, attn_implementation="eager", local_files_only=True
        )
    except Exception as error:
        raise UserError(
            f"{source.path}: transformers cannot load it ({one_line(error)}); correct it, or give --no-logits"
        ) from None
    return model.eval()(tokens_1L).logits[0]


@torch.no_grad()
def load_with_megatron(model: Model, path: Path) -> None:
    """Loads this rank's weights by Megatron's own loader, independent of `MegatronCheckpoint`; collective.

    Raises:
        UserError: there is no checkpoint, or a weight is missing.
    """
    folder = find_checkpoint(path)
    if folder is None:
        raise UserError(f"{path}: no distributed checkpoint of Megatron; give its folder")
    metadata = dist_checkpointing.load_content_metadata(str(folder)) or {"non_homogeneous_layers": True}
    for stage in model:
        expected = stage.sharded_state_dict(metadata=metadata)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch, about Megatron's calls
            loaded, missing, _unexpected = dist_checkpointing.load(
                expected, str(folder), strict=StrictHandling.RETURN_ALL
            )
        # FP8 scales are optional: weights from elsewhere do not have them.
        lacking = sorted(key for key in missing if "_extra_state" not in key)
        if lacking:
            raise UserError(f"{folder}: {lacking[0]} is missing; give a checkpoint of this model")
        stage.load_state_dict(loaded, strict=False)
