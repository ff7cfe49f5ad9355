"""The draws of the seeds plugin, without SGLang."""

from __future__ import annotations

import numpy as np
import torch

from megatron_parallel_r1.rollout.native.sampler import uniform_draws
from megatron_parallel_r1.rollout.sglang_cpu import draw


def test_a_draw_is_the_native_engines() -> None:
    logprobs_BV = torch.randn(64, 11).log_softmax(-1)
    seeds, positions = torch.arange(64) * 7 - 100, torch.arange(64)
    drawn_B1 = draw(logprobs_BV, seeds, positions)
    expected = uniform_draws(seeds.numpy().astype("uint64"), positions.numpy() + 1)
    for row, (weights, uniform) in enumerate(zip(logprobs_BV.double().exp(), expected, strict=True)):
        cumulative = np.cumsum(weights.numpy())
        assert drawn_B1[row, 0] == int((cumulative <= uniform * cumulative[-1]).sum())


def test_frequencies_follow_the_weights() -> None:
    logprobs_V = torch.tensor([0.5, 0.0, 0.3, 0.2, 0.0]).log()
    count = 4000
    drawn_B1 = draw(logprobs_V.expand(count, 5), torch.full((count,), 3), torch.arange(count))
    shares = torch.bincount(drawn_B1[:, 0], minlength=5) / count
    # Five standard deviations of a share of 0.5 among so many draws.
    assert (shares - torch.tensor([0.5, 0.0, 0.3, 0.2, 0.0])).abs().max() < 5 * (0.25 / count) ** 0.5
    assert shares[1] == shares[4] == 0


def test_weight_behind_the_sum_is_never_drawn() -> None:
    # A weight that is lost in the sum before it stands for a target rounded up to the sum.
    logprobs_V = torch.tensor([0.0, -200.0, -torch.inf])
    drawn_B1 = draw(logprobs_V.expand(500, 3), torch.arange(500), torch.zeros(500, dtype=torch.int64))
    assert drawn_B1.max() == 0
