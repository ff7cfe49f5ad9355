"""Importance weights that correct for the gap between the sampling engine and the trainer.

With the engine's numerics or older weights, the probability of a token differs from the trainer's at the
start of the step, so the policy gradient is off-policy. The weight p_trainer / p_engine corrects that;
bounding it limits the variance.

Shapes: N targets.
"""

from __future__ import annotations

import torch

from megatron_parallel_r1.config.objective import CorrectionLevel
from megatron_parallel_r1.rl.objective.surrogate import bounded_exp
from megatron_parallel_r1.train.micro_batch import Segments


def engine_ratios(
    trainer_N: torch.Tensor, engine_N: torch.Tensor, level: CorrectionLevel, segments: Segments | None = None
) -> torch.Tensor:
    """p_trainer / p_engine for each target, without gradient.

    - `token`: the token's ratio.
    - `sequence`: the product over the trace's targets: unbiased, with high variance for long traces.
    - `geometric`: the geometric mean over the trace's targets.

    Token and sequence level: Liu, Li et al., "When Speed Kills Stability: Demystifying RL Collapse from the
    Training-Inference Mismatch", 2025. The geometric mean is GSPO's ratio (arXiv 2507.18071, eq. 7).

    Args:
        trainer_N: log-probs under the trainer's weights at the start of the step.
        engine_N: log-probs as the engine reported them.
        segments: the trace of each target; not needed at token level.
    """
    logs_N = (trainer_N - engine_N).detach()
    if level == "token":
        return bounded_exp(logs_N)
    assert segments is not None, f"correction level {level} needs the trace of each target"
    return bounded_exp(segments.sums(logs_N) if level == "sequence" else segments.means(logs_N))


def truncated(ratio_N: torch.Tensor, cap: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights min(r, cap), and which of them were cut.

    Truncated importance sampling: Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL
    Training", 2025.
    """
    return ratio_N.clamp(max=cap), ratio_N > cap


def masked(ratio_N: torch.Tensor, low: float, high: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights r within [low, high] and 0 outside, and which lie outside.

    Masked importance sampling: Liu, Li et al., 2025 (above), with an upper bound; IcePop: Ling team, "Small
    Leak Can Sink a Great Ship", 2025, with both. A masked target still counts in the mean, as in these:
    otherwise the others of its batch would gain weight.
    """
    outside_N = (ratio_N < low) | (ratio_N > high)
    return ratio_N.masked_fill(outside_N, 0.0), outside_N


def effective_share(mean: float, mean_square: float) -> float:
    """Effective sample size of weights as a share of their number: (Σw)² / (N Σw²), 1 where all are equal.

    After L. Kish, "Survey Sampling", 1965.

    Args:
        mean, mean_square: of the weights; if all are 0, the share is 0.
    """
    return mean * mean / mean_square if mean_square > 0 else 0.0
