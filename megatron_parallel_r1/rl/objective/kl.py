"""Estimates of KL(policy || reference) from tokens that the policy sampled, in nats.

After J. Schulman, "Approximating KL Divergence" (joschu.net/blog/kl-approx.html, 2020).

Shapes: N targets, T traces.
"""

from __future__ import annotations

import torch

from megatron_parallel_r1.config.objective import Kl
from megatron_parallel_r1.rl.objective.surrogate import bounded_exp
from megatron_parallel_r1.train.micro_batch import Segments


def kl_estimates(logprobs_N: torch.Tensor, reference_N: torch.Tensor, kind: Kl) -> torch.Tensor:
    """KL estimate of each target [N], from d = log p - log p_ref.

    - `k1`: d. Unbiased, of either sign. Its gradient is that of log p, whose mean over the policy's samples
      is 0: in a loss it regularises nothing; it belongs in the reward.
    - `k2`: d² / 2. Biased, but its gradient d ∇log p is on average that of KL(policy || reference).
    - `k3`: exp(-d) - 1 + d, GRPO (arXiv 2402.03300, eq. 4). Unbiased and never negative; its gradient is on
      average that of KL(reference || policy).

    These hold for samples of the policy itself: after the first update of a step, approximately.

    Args:
        reference_N: log-probs under the reference's weights, without gradient.
    """
    assert kind != "none", "kl is none: there is nothing to estimate"
    apart_N = logprobs_N - reference_N
    if kind == "k1":
        return apart_N
    if kind == "k2":
        return apart_N.square() / 2
    return bounded_exp(-apart_N) - 1 + apart_N


def kl_penalties(
    old_N: torch.Tensor, reference_N: torch.Tensor, kind: Kl, coefficient: float, segments: Segments
) -> torch.Tensor:
    """The KL penalty on each trace's reward, float64 [T]: minus coefficient x the sum over its targets.

    With k1: r - β log(p / p_ref) of the whole trace, as in RLOO (arXiv 2402.14740).

    Args:
        old_N: log-probs under the sampling weights.
    """
    return -coefficient * segments.totals(kl_estimates(old_N, reference_N, kind).detach())
