"""What a target gains by its ratio and advantage, within bounds. The loss is minus the gain.

Each function also says where a bound held, by name, as boolean vectors over the targets.

Shapes: N targets.
"""

from __future__ import annotations

import torch


def ppo(
    ratio_N: torch.Tensor, advantages_N: torch.Tensor, low: float, high: float, dual: float | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """min(r A, clip(r, 1 - low, 1 + high) A), PPO (arXiv 1707.06347, eq. 7).

    Low and high apart: DAPO's clip-higher (arXiv 2503.14476, eq. 10).

    Where the bound holds there is no gradient: for A > 0 above 1 + high, for A < 0 below 1 - low. A ratio
    that has gone astray the other way keeps its gradient, and for A < 0 it has no limit. Dual clip sets one
    (arXiv 1912.09729): there the gain is at least `dual` x A.

    Args:
        dual: > 1; None: no limit.
    """
    bounded_N = ratio_N.clamp(1 - low, 1 + high)
    gain_N = torch.minimum(ratio_N * advantages_N, bounded_N * advantages_N)
    held_N = bounded_N * advantages_N < ratio_N * advantages_N
    held = {"clipped_low": held_N & (advantages_N < 0), "clipped_high": held_N & (advantages_N > 0)}
    if dual is None:
        return gain_N, held
    beyond_N = (advantages_N < 0) & (ratio_N > dual)
    return torch.where(beyond_N, dual * advantages_N, gain_N), {**held, "clipped_dual": beyond_N}


def cispo(
    logprobs_N: torch.Tensor, ratio_N: torch.Tensor, advantages_N: torch.Tensor, low: float, high: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """sg(clip(r, 1 - low, 1 + high)) A log p, CISPO (arXiv 2506.13585, eq. 4 and 5); sg: no gradient.

    The weight is bounded and not the update, so that every target keeps a gradient, also a rare token whose
    ratio runs away. The paper bounds above only: low = 1.
    """
    detached_N = ratio_N.detach()
    held = {"clipped_low": detached_N < 1 - low, "clipped_high": detached_N > 1 + high}
    return detached_N.clamp(1 - low, 1 + high) * advantages_N * logprobs_N, held
