"""Whether two folders hold the same model: every tensor bit for bit, and the logits that come of it.

Either may be of Hugging Face or of Megatron. Logits of the first are computed by transformers where it reads
that form, and by our model of each, into which Megatron's own loader brings a Megatron checkpoint: not the
reader that conversion uses.

Shapes: L tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from megatron_parallel_r1.architecture.weight_table import weight_table
from megatron_parallel_r1.conversion.checkpoint_source import Side, Slab
from megatron_parallel_r1.conversion.to_megatron import Advance

TOLERANCE = 2e-5  # float32 logits of order 1; relative to the largest where that is more
LENGTH = 64


def compare_shapes(one: Side, two: Side) -> list[str]:
    """Fields of the architectures that differ."""
    return [
        (f"{field.name} is {getattr(one.shape, field.name)} and {getattr(two.shape, field.name)}")
        for field in fields(one.shape)
        if getattr(one.shape, field.name) != getattr(two.shape, field.name)
    ]


def compare_tensors(one: Side, two: Side, advance: Advance = lambda count: None) -> list[str]:
    """Tensors of two models of one shape that are not bit-equal; `advance` is told of each that was read."""
    found = []
    for weight in weight_table(one.shape):
        pairs = zip(weight.parts, one.parts(Slab.whole(weight)), two.parts(Slab.whole(weight)), strict=True)
        for (name, _), first, second in pairs:
            first, second = first.flatten(0, 1), second.flatten(0, 1)
            if first.dtype != second.dtype:
                found.append(f"{name} is {first.dtype} and {second.dtype}")
            elif not torch.equal(_bits(first), _bits(second)):
                apart = (first.double() - second.double()).abs()
                count = int((_bits(first) != _bits(second)).sum())
                found.append(f"{name} differs in {count} of {first.numel()} numbers, by {apart.max():.2g}")
            advance(1)
    return found


def compare_logits(one: Side, two: Side) -> tuple[dict[str, float], list[str]]:
    """The largest differences of float32 logits, by what was compared; and those that are too large."""
    from megatron_parallel_r1.distributed import process

    tokens_1L = torch.randint(0, one.shape.vocab, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    with process.running(seed=0):
        first_LV = _ours(one, tokens_1L)
        apart = {"our model of both": _largest(first_LV - _ours(two, tokens_1L))}
    for name, side in (("first", one), ("second", two)):
        if side.stored is not None:
            apart[f"our model of the first and transformers of the {name}"] = _largest(
                first_LV - _theirs(side, tokens_1L)
            )
            break
    allowed = TOLERANCE * max(1.0, _largest(first_LV))
    far = [
        (f"logits of {what} differ by {gap:.2g}, and {allowed:.2g} is what float32 explains")
        for what, gap in apart.items()
        if not gap <= allowed
    ]
    return apart, far


def _bits(tensor: Tensor) -> Tensor:
    sizes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(sizes[tensor.dtype.itemsize])


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item()


@torch.no_grad()
def _ours(side: Side, tokens_1L: Tensor) -> Tensor:
    from megatron_parallel_r1.checkpoint_formats.hf_folder import load_hf_folder
    from megatron_parallel_r1.conversion.live import load_with_megatron
    from megatron_parallel_r1.model.gpt import build_model, logits
    from megatron_parallel_r1.model.weights import load_hf_tensors

    model = build_model(side.shape)
    if side.checkpoint:
        load_with_megatron(model, side.path)
    else:
        load_hf_tensors(model, load_hf_folder(side.path)[1])
    index_L = torch.arange(LENGTH)
    layout_KL = torch.stack([index_L, torch.zeros_like(index_L)]).int()
    device = next(model.parameters()).device
    given = (tokens_1L.to(device), index_L[None].to(device), layout_KL.to(device))
    return logits(model, *given)[0].cpu()


@torch.no_grad()
def _theirs(side: Side, tokens_1L: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        side.path, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    return model.eval()(tokens_1L).logits[0]
