"""Advantages of traces from their rewards.

Shapes: P prompts, G traces of each.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from megatron_parallel_r1.rl.objective.settings import Advantage

Float64 = NDArray[np.float64]


def group_advantages(rewards_PG: Float64, eps: float = 1e-6) -> Float64:
    """Each reward against its group: (r - mean) / (std + eps), GRPO (arXiv 2402.03300, section 4.1.2).

    The standard deviation is the sample's (divided by G - 1), as in the reference implementations. A group of
    equal rewards teaches nothing: its advantages are 0.
    """
    centred_PG = rewards_PG - rewards_PG.mean(1, keepdims=True)
    if rewards_PG.shape[1] < 2:
        return np.zeros_like(centred_PG)
    return centred_PG / (rewards_PG.std(1, ddof=1, keepdims=True) + eps)


def dr_grpo_advantages(rewards_PG: Float64) -> Float64:
    """r - mean, Dr. GRPO (arXiv 2503.20783, section 3.2).

    Without the division by the standard deviation, which weighs up problems that are nearly always or nearly
    never solved.
    """
    return rewards_PG - rewards_PG.mean(1, keepdims=True)


def rloo_advantages(rewards_PG: Float64) -> Float64:
    """Each reward minus the mean of the others in its group, REINFORCE leave-one-out (arXiv 2402.14740).

    The baseline does not depend on the trace itself, so the policy gradient is unbiased. It is Dr. GRPO's
    advantage times G / (G - 1).
    """
    size = rewards_PG.shape[1]
    if size < 2:
        return np.zeros_like(rewards_PG)
    others_PG = (rewards_PG.sum(1, keepdims=True) - rewards_PG) / (size - 1)
    return rewards_PG - others_PG


ADVANTAGES: dict[Advantage, Callable[[Float64], Float64]] = {
    "grpo": group_advantages,
    "dr_grpo": dr_grpo_advantages,
    "rloo": rloo_advantages,
}
