"""The policy gain of a target from its ratio and advantage, bounded. The loss is minus the gain.

Each surrogate also returns which targets hit a bound, as named boolean vectors.

Shapes: N targets.
"""

from __future__ import annotations

import torch

from megatron_parallel_r1.config.objective import Ratio
from megatron_parallel_r1.train.micro_batch import Segments


def ppo(
    ratio_N: torch.Tensor, advantages_N: torch.Tensor, low: float, high: float, dual: float | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """min(r A, clip(r, 1 - low, 1 + high) A), PPO (arXiv 1707.06347, eq. 7).

    Separate low and high: DAPO's clip-higher (arXiv 2503.14476, eq. 10).

    Beyond the bound there is no gradient: for A > 0 above 1 + high, for A < 0 below 1 - low. A ratio that
    moved in the other direction keeps its gradient, without limit for A < 0. Dual clip sets a limit there
    (arXiv 1912.09729): the gain is at least `dual` x A.

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

    Bounds the weight instead of the update, so every target keeps a gradient, even a rare token with an
    extreme ratio. The paper bounds above only: low = 1.
    """
    detached_N = ratio_N.detach()
    held = {"clipped_low": detached_N < 1 - low, "clipped_high": detached_N > 1 + high}
    return detached_N.clamp(1 - low, 1 + high) * advantages_N * logprobs_N, held


# e^20 is beyond every bound, and finite: a ratio of infinity times an advantage or a gradient of 0 is NaN.
LARGEST_LOG = 20.0


def bounded_exp(logs: torch.Tensor) -> torch.Tensor:
    """exp(x) with x clamped to -20..20."""
    return logs.clamp(-LARGEST_LOG, LARGEST_LOG).exp()


def ratios(
    logprobs_N: torch.Tensor, old_N: torch.Tensor, level: Ratio, segments: Segments | None = None
) -> torch.Tensor:
    """The ratio of each target [N].

    - `token`: the token's p / p_old, GRPO (arXiv 2402.03300, eq. 3).
    - `sequence`: its geometric mean over the targets of the trace, the same for all of them, GSPO (arXiv
      2507.18071, eq. 7). The gradient goes through the mean.
    - `sequence_token`: that value, with the gradient of the token's own log-prob, GSPO-token (eq. 14
      there); for advantages that differ within a trace.

    Args:
        old_N: log-probs under the weights at the start of the step, without gradient.
        segments: the trace of each target; not needed at token level.
    """
    logs_N = logprobs_N - old_N
    if level == "token":
        return bounded_exp(logs_N)
    assert segments is not None, f"ratio {level} needs the trace of each target"
    if level == "sequence":
        return bounded_exp(segments.means(logs_N))
    return bounded_exp(segments.means(logs_N.detach()) + logprobs_N - logprobs_N.detach())
