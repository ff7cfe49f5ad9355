"""Estimates of KL against the definition: exact expectations over a small distribution, and gradients."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_parallel_r1.config.objective import Kl
from megatron_parallel_r1.rl.objective.kl import kl_estimates, kl_penalties
from megatron_parallel_r1.train.micro_batch import Segments

LOGITS_V = torch.tensor([0.3, -0.5, 1.1], dtype=torch.float64)
REFERENCE_V = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("kind", "values", "slopes"),
    [
        # d = 0.5 and -1
        ("k1", [0.5, -1.0], [1.0, 1.0]),
        ("k2", [0.125, 0.5], [0.5, -1.0]),
        ("k3", [math.exp(-0.5) - 0.5, math.e - 2], [1 - math.exp(-0.5), 1 - math.e]),
    ],
)
def test_estimates_and_slopes_by_hand(kind: Kl, values: list[float], slopes: list[float]) -> None:
    logprobs_N = torch.tensor([-1.0, -3.0], dtype=torch.float64, requires_grad=True)
    found_N = kl_estimates(logprobs_N, torch.tensor([-1.5, -2.0], dtype=torch.float64), kind)
    assert found_N.tolist() == pytest.approx(values)
    found_N.sum().backward()
    assert logprobs_N.grad.tolist() == pytest.approx(slopes)


def kl(p_logs_V: torch.Tensor, q_logs_V: torch.Tensor) -> torch.Tensor:
    return (p_logs_V.exp() * (p_logs_V - q_logs_V)).sum()


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(kind: Kl) -> None:
    logs_V = LOGITS_V.log_softmax(0)
    mean = (logs_V.exp() * kl_estimates(logs_V, REFERENCE_V, kind)).sum()
    assert mean.item() == pytest.approx(kl(logs_V, REFERENCE_V).item(), rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "pulls"),
    [("k1", "nothing"), ("k2", "KL(policy || reference)"), ("k3", "KL(reference || policy)")],
)
def test_what_the_mean_gradient_in_a_loss_minimises(kind: Kl, pulls: str) -> None:
    logits_V = LOGITS_V.clone().requires_grad_()
    logs_V = logits_V.log_softmax(0)
    # Over samples of the policy: the sampling itself has no gradient.
    mean = (logs_V.exp().detach() * kl_estimates(logs_V, REFERENCE_V, kind)).sum()
    (found_V,) = torch.autograd.grad(mean, logits_V, retain_graph=True)
    objective = {
        "nothing": logits_V.sum() * 0,
        "KL(policy || reference)": kl(logs_V, REFERENCE_V),
        "KL(reference || policy)": kl(REFERENCE_V, logs_V),
    }[pulls]
    (expected_V,) = torch.autograd.grad(objective, logits_V)
    assert found_V.tolist() == pytest.approx(expected_V.tolist(), abs=1e-12)  # float64 rounding


def test_penalty_in_the_reward_by_hand() -> None:
    old_N = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    reference_N = torch.tensor([-1.5, -1.0, -1.5])
    found_T = kl_penalties(old_N, reference_N, "k1", 0.1, Segments(torch.tensor([0, 2, 0]), 3))
    # Trace 0: 0.5 + 1; trace 1 has no targets here; trace 2: -1, which is a reward.
    assert found_T.tolist() == pytest.approx([-0.15, 0.0, 0.1])
    assert not found_T.requires_grad


def test_k3_stays_finite_for_a_token_that_the_policy_has_forgotten() -> None:
    logprobs_N = torch.tensor([-200.0], requires_grad=True)
    kl_estimates(logprobs_N, torch.zeros(1), "k3").sum().backward()
    assert logprobs_N.grad.isfinite().all()
