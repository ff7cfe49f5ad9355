"""Losses over targets. Each returns a sum; the trainer divides by the targets of the whole batch.

So every token weighs the same however the batch is packed or split: token-level (DAPO, arXiv 2503.14476).

Shapes: N targets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


def sft_loss(logprobs_N: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood, summed over targets."""
    return -logprobs_N.sum()


@dataclass(frozen=True, slots=True)
class Clip:
    """Bounds of the ratio, 1 - low .. 1 + high. The paper clips at 0.2 and 0.28 (DAPO's clip-higher)."""

    low: float = 0.2
    high: float = 0.28


def grpo_loss(
    logprobs_N: torch.Tensor, old_logprobs_N: torch.Tensor, advantages_N: torch.Tensor, clip: Clip
) -> tuple[torch.Tensor, torch.Tensor]:
    """The clipped surrogate of GRPO (arXiv 2402.03300, eq. 3, without its KL term), summed over targets.

    Args:
        logprobs_N: under the weights being trained.
        old_logprobs_N: under the weights that began the step.
        advantages_N: of each target's trace.

    Returns:
        The loss, and the number of targets whose ratio was clipped.
    """
    ratio_N = (logprobs_N - old_logprobs_N).exp()
    bounded_N = ratio_N.clamp(1 - clip.low, 1 + clip.high)
    gain_N = torch.minimum(ratio_N * advantages_N, bounded_N * advantages_N)
    clipped = (bounded_N * advantages_N < ratio_N * advantages_N).sum()
    return -gain_N.sum(), clipped.detach()
