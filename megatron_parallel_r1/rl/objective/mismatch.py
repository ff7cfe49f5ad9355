"""The difference between the engine's and the trainer's log-probs: rounding alone if both agree.

Shapes: N targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_parallel_r1.rl.objective.correction import effective_share
from megatron_parallel_r1.rl.objective.surrogate import bounded_exp


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Differences over all sampled tokens of a step, in nats.

    Attributes:
        max, mean: of |trainer - engine|.
        k3: mean of r - 1 - log r with r = p_trainer / p_engine, an estimate of KL(engine || trainer)
            (Schulman, "Approximating KL divergence", 2020).
        effective: effective sample size of the weights r as a share of the tokens; 1 if both agree.
    """

    max: float
    mean: float
    k3: float
    effective: float

    @classmethod
    def of(cls, sums: Mapping[str, float], largest: float) -> Mismatch:
        """From `mismatch_sums` of all tokens and the largest |trainer - engine|; 0 without tokens."""
        tokens = sums["tokens"]
        if not tokens:
            return cls(max=0.0, mean=0.0, k3=0.0, effective=1.0)
        return cls(
            max=largest,
            mean=sums["apart"] / tokens,
            k3=sums["k3"] / tokens,
            effective=effective_share(sums["ratio"] / tokens, sums["ratio_square"] / tokens),
        )


def mismatch_sums(trainer_N: torch.Tensor, engine_N: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sums over targets, float64 scalars, to be added by name over micro-batches and ranks (`sum_metrics`).

    Returns:
        The number of targets (`tokens`), |trainer - engine| (`apart`), k3, the ratio and its square.
    """
    apart_N = _apart(trainer_N, engine_N)
    ratio_N = bounded_exp(apart_N)
    columns = {
        "tokens": torch.ones_like(apart_N),
        "apart": apart_N.abs(),
        "k3": apart_N.exp() - 1 - apart_N,
        "ratio": ratio_N,
        "ratio_square": ratio_N.square(),
    }
    return {name: column_N.sum() for name, column_N in columns.items()}


def largest_apart(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
    """The largest |trainer - engine| and the largest |trainer| of all pairs, 0 without any.

    Reduced over ranks by `all_reduce_max`.
    """
    largest = [
        torch.stack([_apart(*pair).abs().max(), pair[0].detach().double().abs().max()])
        for pair in pairs
        if len(pair[0])
    ]
    return torch.stack(largest).amax(0).tolist() if largest else [0.0, 0.0]


def mismatch(trainer_N: torch.Tensor, engine_N: torch.Tensor) -> Mismatch:
    """Compares log-probs of the same tokens under the same weights, all on this rank."""
    sums = {name: value.item() for name, value in mismatch_sums(trainer_N, engine_N).items()}
    return Mismatch.of(sums, largest_apart([(trainer_N, engine_N)])[0])


def _apart(trainer_N: torch.Tensor, engine_N: torch.Tensor) -> torch.Tensor:
    return trainer_N.detach().double() - engine_N.double()
