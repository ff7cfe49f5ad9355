"""How far the engine's log-probs are from the trainer's: 0 but for rounding where rollout and training agree.

Shapes: N targets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Over all sampled tokens of a step; nats.

    Attributes:
        max, mean: of |trainer - engine|.
        k3: mean of r - 1 - log r with r = p_trainer / p_engine, an estimate of KL(engine || trainer)
            (Schulman, "Approximating KL divergence", 2020).
    """

    max: float
    mean: float
    k3: float


def mismatch(trainer_N: torch.Tensor, engine_N: torch.Tensor) -> Mismatch:
    """Compares log-probs of the same tokens under the same weights."""
    difference_N = trainer_N.double() - engine_N.double()
    return Mismatch(
        max=difference_N.abs().max().item(),
        mean=difference_N.abs().mean().item(),
        k3=(difference_N.exp() - 1 - difference_N).mean().item(),
    )
