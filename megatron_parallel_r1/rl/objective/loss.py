"""The loss of GRPO and its family: a sum over targets, divided by the trainer by the update's targets.

So the weight of a target does not depend on packing or splitting (aggregation.py).

Shapes: N targets of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megatron_parallel_r1.config.objective import Objective
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rl.objective.correction import engine_ratios, masked, truncated
from megatron_parallel_r1.rl.objective.kl import kl_estimates
from megatron_parallel_r1.rl.objective.surrogate import cispo, ppo, ratios
from megatron_parallel_r1.train.micro_batch import Segments
from megatron_parallel_r1.utils.user_function import in_one_line, load_function


def policy_loss(
    logprobs_N: torch.Tensor,
    entropies_N: torch.Tensor,
    values: Mapping[str, torch.Tensor],
    objective: Objective,
    segments: Segments | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of GRPO and its family, summed over targets: weight x (-gain + KL term - entropy bonus).

    Args:
        logprobs_N: under the weights being trained.
        entropies_N: entropies in nats of the distributions that the targets were drawn from; differentiable
            if there is an entropy bonus.
        values: float32 [N] each, without gradient. Always `advantage` and `weight`
            (aggregation.target_weights). `old`: log-probs under the weights at the start of the step; absent
            if these are the weights being trained. `engine`: the engine's log-probs, for a correction.
            `reference`: the reference's log-probs, for a KL term in the loss.
        segments: the trace of each target; not needed if ratio and correction are per token.

    Returns:
        The loss, and sums over the targets whose weight is not 0: their number (`trained`), the number that
        hit a bound (`clipped_low`, `clipped_high`, `clipped_dual`), the k3 estimate of KL(policy at the start
        of the step || policy) (`kl_old`), the KL estimate in the loss (`kl`), and for the correction the
        importance weights, their squares, and the number that were cut (`correction`, `correction_square`,
        `corrected`).
    """
    old_N = values.get("old", logprobs_N.detach())
    ratio_N = ratios(logprobs_N, old_N, objective.ratio, segments)
    gain_N, reports = _gain(objective, logprobs_N, ratio_N, values)
    # In float64: a small step is far below the rounding of exp(d) - 1 - d in float32.
    reports["kl_old"] = kl_estimates(old_N.double(), logprobs_N.detach().double(), "k3")

    if objective.correction != "none":
        engine_N = engine_ratios(old_N, values["engine"], objective.correction_level, segments)
        correction_N, cut_N = _bounded(objective, engine_N)
        gain_N = correction_N * gain_N
        reports |= {
            "correction": correction_N,
            "correction_square": correction_N.square(),
            "corrected": cut_N,
        }

    loss_N = -gain_N
    if objective.kl != "none" and objective.kl_in == "loss":
        kl_N = kl_estimates(logprobs_N, values["reference"], objective.kl)
        loss_N = loss_N + objective.kl_coefficient * kl_N
        reports["kl"] = kl_N.detach()
    if objective.entropy_coefficient:
        loss_N = loss_N - objective.entropy_coefficient * entropies_N

    trained_N = values["weight"] != 0
    # Not `report_N[trained_N]`, whose shape the host would wait for.
    sums = {name: report_N.where(trained_N, 0).sum() for name, report_N in reports.items()}
    sums["trained"] = trained_N.sum()
    return (values["weight"] * loss_N).sum(), sums


def _gain(
    objective: Objective,
    logprobs_N: torch.Tensor,
    ratio_N: torch.Tensor,
    values: Mapping[str, torch.Tensor],
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    low, high = objective.clip_low, objective.clip_high
    advantages_N = values["advantage"]
    if objective.surrogate == "ppo":
        return ppo(ratio_N, advantages_N, low, high, objective.dual_clip)
    if objective.surrogate == "cispo":
        return cispo(logprobs_N, ratio_N, advantages_N, low, high)
    return _own_gain(objective.surrogate, logprobs_N, ratio_N, values), {}


def _own_gain(
    name: str, logprobs_N: torch.Tensor, ratio_N: torch.Tensor, values: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """
    Raises:
        UserError: the user's function raised, or returned no tensor of N gains with a gradient.
    """
    what = f"objective.surrogate {name}"
    try:
        gain_N = load_function(name, what)(logprobs_N, ratio_N, values)
    except (Exception, SystemExit) as error:
        raise UserError(f"{what}: {in_one_line(error)}") from error
    is_gain = isinstance(gain_N, torch.Tensor) and gain_N.shape == logprobs_N.shape
    if not is_gain or gain_N.requires_grad < logprobs_N.requires_grad:
        raise UserError(
            f"{what}: it returned {in_one_line(gain_N)} for {len(logprobs_N)} targets; return a tensor with "
            "the gain of each, differentiable in logprobs_N or ratio_N"
        )
    return gain_N


def _bounded(objective: Objective, ratio_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if objective.correction == "truncate":
        return truncated(ratio_N, objective.correction_cap)
    return masked(ratio_N, objective.correction_low, objective.correction_cap)
