"""Tiny models with layers of Transformer Engine, a fixed batch, and what of a trainer is compared."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_parallel_r1.architecture.model_config import ExpertsConfig, ModelConfig
from megatron_parallel_r1.distributed.parallel_config import ParallelConfig
from megatron_parallel_r1.model.gpt import Model, build_model
from megatron_parallel_r1.model.layers import Layers
from megatron_parallel_r1.model.weights import hf_tensors, load_hf_tensors, random_hf_tensors
from megatron_parallel_r1.train.micro_batch import MicroBatch, partition_rows
from megatron_parallel_r1.train.trainer import Adam, Trainer
from tests.parallel.steps import batch_of_rows

# Sizes of each rank's parts are multiples of 16, also over two ranks.
SHAPE = ModelConfig(hidden=64, layers=3, heads=4, kv_heads=2, head_dim=16, ffn=96, vocab=41, rope_theta=1e3)
EXPERTS = replace(SHAPE, family="qwen3_moe", experts=ExpertsConfig(count=4, per_token=2, ffn=32))
SCALINGS = ("delayed", "current", "blockwise")
BF16 = Layers("transformer_engine")
LR = 1e-3
ROWS = 8


def fp8_layers(scaling: str, **others: Any) -> Layers:
    return Layers("transformer_engine", fp8=scaling, **others)


class RoutingByPlace:
    """Routes by a token's place in the row: FP8's rounding flips a near tie, which no mantissa bounds.

    The last expert gets no token, and the others' numbers are no multiples of 16. Takes the place of
    Megatron's RouterReplay.
    """

    def get_replay_topk(self, scores_TX: Tensor, count: int, *others: object) -> tuple[Tensor, Tensor]:
        """Returns the scores of the selected experts and their numbers, both [T, count]."""
        places_T1 = torch.arange(len(scores_TX))[:, None]
        chosen = (places_T1 + torch.arange(count)) % (scores_TX.shape[1] - 1)
        return scores_TX.gather(1, chosen), chosen


def trainer_of(
    layers: Layers,
    parallel: ParallelConfig | None = None,
    shape: ModelConfig = SHAPE,
    routed_by_place: bool = False,
) -> tuple[Trainer, list[MicroBatch]]:
    """A fresh trainer and its micro-batches; forgets the layers of former ones."""
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    FP8GlobalStateManager.reset()
    parallel = parallel or ParallelConfig(sharded_optimizer=layers.fp8_params)
    model = build_model(shape, torch.bfloat16, parallel, layers)
    load_hf_tensors(model, random_hf_tensors(shape, seed=7, std=0.2))
    for module in model.modules():
        if routed_by_place and isinstance(module, TopKRouter):
            module.router_replay = RoutingByPlace()
    adam = Adam(lr=LR, eps=1e-6, weight_decay=0.1, clip=0.0, sharded=parallel.sharded_optimizer)
    trainer = Trainer(model, adam)
    rows = batch_of_rows()[0][:ROWS]
    tokens = sum(map(len, rows)) * 2 // 3
    own = partition_rows(rows, tokens - tokens % 32, trainer.partition)
    return trainer, [MicroBatch.of(row, trainer.device) for row in own]


def train(trainer: Trainer, batches: list[MicroBatch], steps: int, lr: float = LR) -> list[float]:
    return [
        trainer.update(batches, lambda logprobs_N, *_: (-logprobs_N.sum(), {}), lr).loss for _ in range(steps)
    ]


def weights_of(model: Model) -> dict[str, Tensor]:
    return {name: weight.float().clone() for name, weight in hf_tensors(model)}


def histories(model: Model) -> list[Tensor]:
    """Scales and histories of delayed scaling, of all layers."""
    return [
        tensor.clone()
        for layer in model.modules()
        if hasattr(layer, "fp8_meta")
        for way in ("scaling_fwd", "scaling_bwd")
        if hasattr(layer.fp8_meta.get(way), "scale")
        for tensor in (layer.fp8_meta[way].scale, layer.fp8_meta[way].amax_history)
    ]


def weight_scales(model: Model) -> list[float]:
    """What delayed scaling will scale each layer's weights by; of its [input, weight, output] the second."""
    return [
        layer.fp8_meta["scaling_fwd"].scale[1].item()
        for layer in model.modules()
        if hasattr(getattr(layer, "fp8_meta", {}).get("scaling_fwd"), "scale")
    ]


def gradients(trainer: Trainer) -> Tensor:
    """All gradients of the last update."""
    return torch.cat([p.main_grad.flatten() for p in trainer.model.parameters()])


def apart(found: Tensor, right: Tensor) -> float:
    """The norm of the difference relative to the norm of `right`."""
    return ((found - right).norm() / right.norm()).item()
