"""What autograd keeps of a forward pass, beside what the plan says; run by torchrun for split models.

torchrun --nproc-per-node 2 -m tests.planning.kept_by_autograd OUT.json "tensor=2 sequence" "context=2"

Shapes: L tokens of a row, T of them on this process.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_parallel_r1.architecture.model_config import ExpertsConfig, ModelConfig
from megatron_parallel_r1.distributed import process
from megatron_parallel_r1.distributed.collectives import all_gather_objects
from megatron_parallel_r1.distributed.parallel_config import ParallelConfig
from megatron_parallel_r1.model.gpt import build_model
from megatron_parallel_r1.model.layers import Layers
from megatron_parallel_r1.model.weights import load_hf_tensors, random_hf_tensors
from megatron_parallel_r1.planning.memory import Workload, activation_bytes, layer_bytes, pipeline_parts
from megatron_parallel_r1.thought.packing import context_indices
from megatron_parallel_r1.train.target_logprobs import LogprobQuery, target_logprobs
from megatron_parallel_r1.train.trainer import Adam, wrap_for_training
from megatron_parallel_r1.utils.rank import is_rank_zero
from tests.parallel.launch import settings_of

SHAPE = ModelConfig(hidden=256, layers=3, heads=4, kv_heads=2, head_dim=32, ffn=640, vocab=300)
EXPERTS = ExpertsConfig(count=8, per_token=2, ffn=320)
SHAPES = (
    SHAPE,
    replace(SHAPE, family="qwen3_moe", experts=EXPERTS),
    replace(SHAPE, family="qwen3_moe", experts=replace(EXPERTS, renormalized=False)),
)
LENGTH = 128
DTYPES = (torch.float32, torch.bfloat16)
RECOMPUTE = ("none", "selective", "full")


def compare(
    shape: ModelConfig, dtype: torch.dtype, parallel: ParallelConfig, fused: bool = False
) -> tuple[int, int]:
    """Bytes kept of one row whose every token is a target, and bytes planned for it."""
    model = build_model(shape, dtype, parallel, Layers(fused_swiglu=fused))
    load_hf_tensors(model, random_hf_tensors(shape, seed=0))
    (wrapped,), _optimizer = wrap_for_training(model, Adam(lr=1e-3))
    held = torch.distributed.get_rank() if parallel.context > 1 else 0
    index_T = torch.from_numpy(np.asarray(context_indices(LENGTH, held, parallel.context)))
    tokens_T = index_T % shape.vocab
    layout_2T = torch.stack([index_T, torch.zeros_like(index_T)]).int()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden_TE = model[-1].whole_hidden(wrapped(tokens_T[None], index_T[None], layout_2T))
        target_logprobs(
            hidden_TE[torch.arange(len(tokens_T))],
            model[-1].head_weight(),
            LogprobQuery(tokens_T, torch.full_like(tokens_T, -1), 1.0, shape.vocab),
        )
    number = dtype.itemsize
    (part, *_) = pipeline_parts(shape, parallel)
    assert part.elements == sum(parameter.numel() for parameter in model.parameters())
    planned = activation_bytes(shape, parallel, part, Workload(LENGTH, 1, fused=fused), number)
    # Of what is computed anew, nothing is there yet before backward.
    attention, norm, mlp = layer_bytes(shape, parallel, LENGTH, number, fused)
    planned -= {"none": 0, "selective": mlp, "full": attention + norm + mlp}[parallel.recompute]
    if dtype == torch.bfloat16 and parallel.recompute != "full":
        planned += shape.layers * widened(parallel, len(tokens_T))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), planned


def widened(parallel: ParallelConfig, tokens: int) -> int:
    """What a CPU's attention keeps of a layer on top in bfloat16: float32 query, key, value in place of
    bfloat16 ones, and the output in both."""
    query, key = (count * SHAPE.head_dim // parallel.tensor for count in (SHAPE.heads, SHAPE.kv_heads))
    of_value = 4 if parallel.context == 1 else 2  # a view before, or a copy
    return tokens * (2 + 4) * query + LENGTH * (2 + of_value) * key


def compare_all(parallel: ParallelConfig) -> list[tuple[int, int]]:
    ways = [parallel.replace(recompute=way) for way in RECOMPUTE]
    return [compare(shape, dtype, way) for shape in shapes(parallel) for dtype in DTYPES for way in ways]


def shapes(parallel: ParallelConfig) -> tuple[ModelConfig, ...]:
    """Those that can be split so: Megatron splits experts over a tensor group only with sequence."""
    if parallel.expert > 1:
        return SHAPES[1:]
    return SHAPES if parallel.tensor == 1 or parallel.sequence else SHAPES[:1]


def of_all_ranks(parallel: ParallelConfig) -> list[tuple[float, int]]:
    """What the first rank keeps; with experts elsewhere the mean, for only that is evenly distributed."""
    found = all_gather_objects(compare_all(parallel))
    if parallel.expert == 1:
        return [*found[0]]
    return [(sum(kept for kept, _ in ranks) / len(ranks), ranks[0][1]) for ranks in zip(*found, strict=True)]


def main() -> None:
    out, *layouts = sys.argv[1:]
    found = {}
    for layout in layouts:
        parallel = ParallelConfig(**settings_of(layout))
        with process.running(seed=1, parallel=parallel):
            found[layout] = of_all_ranks(parallel)
    if is_rank_zero():
        Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
