"""Ratios and surrogates, values and gradients, against cases worked out by hand.

In float64, with pytest's relative 1e-6 for numbers that are written out with fewer digits than that.
"""

from __future__ import annotations

import math

import pytest
import torch

from megatron_parallel_r1.rl.objective.surrogate import cispo, ppo, ratios
from megatron_parallel_r1.train.micro_batch import Segments


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def counts(held: dict[str, torch.Tensor]) -> dict[str, int]:
    return {name: int(held_N.sum()) for name, held_N in held.items()}


def gradient(gain_N: torch.Tensor, logprobs_N: torch.Tensor) -> list[float]:
    return torch.autograd.grad(gain_N.sum(), logprobs_N)[0].tolist()


# Whose the five targets are: two of trace 0, three of trace 1, not in order.
MEMBERS = Segments(torch.tensor([0, 1, 1, 0, 1]), 2)


def test_token_ratio_by_hand() -> None:
    logprobs_N = tensor(-1.0, -2.0).requires_grad_()
    ratio_N = ratios(logprobs_N, tensor(-1.5, -1.0), "token")
    assert ratio_N.tolist() == pytest.approx([math.exp(0.5), math.exp(-1.0)])
    assert gradient(ratio_N, logprobs_N) == pytest.approx([math.exp(0.5), math.exp(-1.0)])


def test_gspo_ratio_by_hand() -> None:
    logprobs_N = tensor(0.3, -0.1, 0.4, 0.1, 0.6).requires_grad_()
    ratio_N = ratios(logprobs_N, tensor(0, 0, 0, 0, 0), "sequence", MEMBERS)
    # Means 0.4 / 2 and 0.9 / 3.
    first, second = math.exp(0.2), math.exp(0.3)
    assert ratio_N.tolist() == pytest.approx([first, second, second, first, second])
    # Advantages 2 and -1 for the traces: each target's share of 2 x 2 s and 3 x -1 s is a half and a third.
    gain_N = tensor(2, -1, -1, 2, -1) * ratio_N
    assert gradient(gain_N, logprobs_N) == pytest.approx(
        [2 * first, -second, -second, 2 * first, -second], rel=1e-12
    )


def test_gspo_gradient_is_of_the_mean_where_advantages_or_weights_differ() -> None:
    logprobs_N = tensor(0.3, 0.1).requires_grad_()
    ratio_N = ratios(logprobs_N, tensor(0, 0), "sequence", Segments(torch.tensor([0, 0]), 1))
    # s = e^0.2, d s / d logp = s / 2 for either target: (1 + 3) s / 2.
    assert gradient(tensor(1, 3) * ratio_N, logprobs_N) == pytest.approx([2 * math.exp(0.2)] * 2)


def test_gspo_token_has_the_trace_s_value_and_the_token_s_gradient() -> None:
    logprobs_N = tensor(0.3, 0.1).requires_grad_()
    ratio_N = ratios(logprobs_N, tensor(0, 0), "sequence_token", Segments(torch.tensor([0, 0]), 1))
    assert ratio_N.tolist() == pytest.approx([math.exp(0.2)] * 2)
    found = gradient(tensor(1, 3) * ratio_N, logprobs_N)
    assert found == pytest.approx([math.exp(0.2), 3 * math.exp(0.2)])


def test_gspo_gradient_against_finite_differences() -> None:
    generator = torch.Generator().manual_seed(3)
    logprobs_N = (torch.randn(5, generator=generator, dtype=torch.float64) / 10).requires_grad_()
    old_N, advantages_N = torch.zeros_like(logprobs_N), tensor(1.2, -0.4, -0.4, 1.2, -0.4)

    def gain(given_N: torch.Tensor) -> torch.Tensor:
        return ppo(ratios(given_N, old_N, "sequence", MEMBERS), advantages_N, 0.2, 0.28)[0].sum()

    assert torch.autograd.gradcheck(gain, (logprobs_N,))


def test_ppo_clips_low_and_high_apart_by_hand() -> None:
    ratio_N = tensor(1.5, 1.5, 0.5, 0.5, 1.1)
    advantages_N = tensor(2, -2, 2, -2, 1)
    logprobs_N = ratio_N.log().requires_grad_()
    gain_N, held = ppo(logprobs_N.exp(), advantages_N, 0.2, 0.28)
    # min(3, 2.56), min(-3, -2.56), min(1, 1.6), min(-1, -1.6), 1.1
    assert gain_N.tolist() == pytest.approx([2.56, -3.0, 1.0, -1.6, 1.1])
    assert counts(held) == {"clipped_low": 1, "clipped_high": 1}
    # Where the bound holds there is no gradient, elsewhere d(r A) / d logp = r A.
    assert gradient(gain_N, logprobs_N) == pytest.approx([0.0, -3.0, 1.0, 0.0, 1.1])


def test_dual_clip_by_hand() -> None:
    ratio_N = tensor(4.0, 4.0, 2.0, 0.5)
    advantages_N = tensor(-2, 2, -2, -2)
    logprobs_N = ratio_N.log().requires_grad_()
    gain_N, held = ppo(logprobs_N.exp(), advantages_N, 0.2, 0.28, dual=3.0)
    # max(-8, 3 x -2); 1.28 x 2, which dual clip leaves alone; 2 x -2 is above -6; 0.8 x -2
    assert gain_N.tolist() == pytest.approx([-6.0, 2.56, -4.0, -1.6])
    assert counts(held) == {"clipped_low": 1, "clipped_high": 1, "clipped_dual": 1}
    assert gradient(gain_N, logprobs_N) == pytest.approx([0.0, 0.0, -4.0, 0.0])


def test_cispo_by_hand() -> None:
    logprobs_N = tensor(-1.0, -2.0, -0.5, -3.0).requires_grad_()
    old_N = (logprobs_N - tensor(1.5, 0.5, 1.1, 4.0).log()).detach()
    advantages_N = tensor(2, 2, -1, -1)
    gain_N, held = cispo(logprobs_N, ratios(logprobs_N, old_N, "token"), advantages_N, 0.2, 0.28)
    # Weights 1.28, 0.8, 1.1, 1.28 times advantage times log-prob; every target keeps weight x A as gradient.
    assert gain_N.tolist() == pytest.approx([-2.56, -3.2, 0.55, 3.84])
    assert gradient(gain_N, logprobs_N) == pytest.approx([2.56, 1.6, -1.1, -1.28])
    assert counts(held) == {"clipped_low": 1, "clipped_high": 2}


def test_cispo_without_a_lower_bound() -> None:
    logprobs_N = tensor(-5.0).requires_grad_()
    gain_N, held = cispo(logprobs_N, tensor(0.01), tensor(1.0), 1.0, 0.28)
    assert gain_N.tolist() == pytest.approx([-0.05])
    assert counts(held) == {"clipped_low": 0, "clipped_high": 0}


@pytest.mark.parametrize("dual", [None, 3.0])
@pytest.mark.parametrize("apart", [200.0, -200.0])
def test_ratios_beyond_float_keep_gain_and_gradient_finite(apart: float, dual: float | None) -> None:
    logprobs_N = torch.tensor([apart - 1.0] * 3, requires_grad=True)  # e^200 is infinite in float32
    ratio_N = ratios(logprobs_N, torch.full((3,), -1.0), "token")
    gain_N, _ = ppo(ratio_N, torch.tensor([1.0, 0.0, -1.0]), 0.2, 0.28, dual)
    assert gain_N.isfinite().all()
    assert gradient(gain_N, logprobs_N) == [0.0, 0.0, 0.0]
