"""Trains under parallel layouts of two ranks, and in one process for comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from megatron_parallel_r1.architecture.model_config import ExpertsConfig, ModelConfig
from megatron_parallel_r1.distributed import process
from megatron_parallel_r1.distributed.parallel_config import ParallelConfig
from tests.fake_engine.children import in_children
from tests.fake_engine.models import (
    EXPERTS,
    LR,
    SCALINGS,
    SHAPE,
    apart,
    fp8_layers,
    train,
    trainer_of,
    weight_scales,
    weights_of,
)

# Ranks see other places of a row, so each expert takes each token.
ALL_EXPERTS = replace(
    SHAPE, layers=2, family="qwen3_moe", experts=ExpertsConfig(count=2, per_token=2, ffn=32)
)
# The gradient of a tied matrix is the sum of two stages', whose order would matter.
STAGES = replace(EXPERTS, layers=2, tied=False)


@dataclass(frozen=True)
class Case:
    """A model, whether its matrices are kept in FP8, and a layout of two ranks."""

    layout: Mapping[str, Any] = field(default_factory=dict)
    shape: ModelConfig = SHAPE
    kept: bool = False


CASES = {
    "tensor": Case({"tensor": 2}),
    "sequence": Case({"tensor": 2, "sequence": True}),
    "context": Case({"context": 2}),
    "experts, sequence, full recompute": Case(
        {"tensor": 2, "sequence": True, "recompute": "full"}, ALL_EXPERTS
    ),
    "experts in FP8, context, selective recompute": Case(
        {"context": 2, "recompute": "selective"}, ALL_EXPERTS, kept=True
    ),
    "experts, pipeline, selective recompute": Case({"pipeline": 2, "recompute": "selective"}, STAGES),
    "experts in FP8, pipeline": Case({"pipeline": 2}, STAGES, kept=True),
}


def runs(cases: list[Case]) -> list[dict[str, Any]]:
    """Losses of three steps, final weights, and scales under each case's layout, by scaling."""
    torch.set_num_threads(1)
    found = []
    for case in cases:
        parallel = ParallelConfig(**case.layout, sharded_optimizer=case.kept)
        with process.running(1, parallel):
            found.append({scaling: _run(case, parallel, scaling) for scaling in SCALINGS})
    return found


def _run(case: Case, parallel: ParallelConfig, scaling: str) -> dict[str, Any]:
    trainer, batches = trainer_of(fp8_layers(scaling, fp8_params=case.kept), parallel, case.shape)
    losses = train(trainer, batches, 3)
    weights = weights_of(trainer.model)
    return {
        "losses": losses,
        "weights": torch.cat([weights[name].flatten() for name in sorted(weights)]).numpy(),
        "scales": weight_scales(trainer.model),
    }


def beside_one_process() -> dict[str, Any]:
    """How far each case ends from one process, by case and scaling."""
    models = list(dict.fromkeys((case.shape, case.kept) for case in CASES.values()))
    (whole,) = in_children(1, runs, [Case({}, *model) for model in models])
    ranks = in_children(2, runs, list(CASES.values()))
    result: dict[str, Any] = {}
    for name, case, *both in zip(CASES, CASES.values(), *ranks, strict=True):
        for scaling in SCALINGS:
            right = whole[models.index((case.shape, case.kept))][scaling]
            first, second = (run[scaling] for run in both)
            ours, theirs = (torch.from_numpy(run["weights"]) for run in (first, right))
            result.setdefault(name, {})[scaling] = {
                "losses": first["losses"],
                "right": right["losses"],
                "weights_apart": apart(ours, theirs),
                # Adam moves no weight further in a step than by the learning rate.
                "weights_apart_at_most": 2 * 3 * LR * len(theirs) ** 0.5 / theirs.norm().item(),
                "scales": [first["scales"], second["scales"]],
                "right_scales": right["scales"],
            }
    return result
