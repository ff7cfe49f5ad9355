"""How much more likely the policy makes what was sampled: the importance ratio, of a token or of a trace.

Shapes: N targets.
"""

from __future__ import annotations

import torch

from megatron_parallel_r1.rl.objective.segments import Members
from megatron_parallel_r1.rl.objective.settings import Ratio

# e^20 is beyond every bound, and finite: a ratio of infinity times an advantage or a gradient of 0 is NaN.
LARGEST_LOG = 20.0


def bounded_exp(logs: torch.Tensor) -> torch.Tensor:
    """exp, flat outside -20..20."""
    return logs.clamp(-LARGEST_LOG, LARGEST_LOG).exp()


def ratios(
    logprobs_N: torch.Tensor, old_N: torch.Tensor, level: Ratio, members: Members | None = None
) -> torch.Tensor:
    """The ratio that each target's gain is computed with.

    - `token`: p / p_old of the token, GRPO (arXiv 2402.03300, eq. 3).
    - `sequence`: its geometric mean over the targets of the trace, the same for all of them, GSPO (arXiv
      2507.18071, eq. 7). The gradient goes through the mean.
    - `sequence_token`: that value, with the gradient of the token's own log-prob, GSPO-token (eq. 14
      there); for advantages that differ within a trace.

    Args:
        old_N: log-probs under the weights that began the step, without gradient.
        members: whose the targets are; not needed at token level.
    """
    logs_N = logprobs_N - old_N
    if level == "token":
        return bounded_exp(logs_N)
    assert members is not None, f"ratio {level} needs to know whose the targets are"
    if level == "sequence":
        return bounded_exp(members.means(logs_N))
    return bounded_exp(members.means(logs_N.detach()) + logprobs_N - logprobs_N.detach())
