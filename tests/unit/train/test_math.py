"""Formulas against cases worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megatron_parallel_r1.train.advantage import group_advantages
from megatron_parallel_r1.train.losses import Clip, grpo_loss, sft_loss
from megatron_parallel_r1.train.mismatch import mismatch
from megatron_parallel_r1.train.trainer import Schedule


def test_group_advantages_by_hand() -> None:
    rewards_PG = np.array([[1.0, 1.0, -1.0, -1.0], [1.0, 1.0, 1.0, 1.0], [1.0, -1.0, -1.0, -1.0]])
    std = math.sqrt(4 / 3)
    expected = [[1 / std, 1 / std, -1 / std, -1 / std], [0.0] * 4, [1.5, -0.5, -0.5, -0.5]]
    assert np.allclose(group_advantages(rewards_PG), expected, atol=1e-5)
    assert (group_advantages(np.ones((3, 1))) == 0).all()


def test_grpo_loss_clips_apart_by_hand() -> None:
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1])
    advantages = torch.tensor([2.0, -2.0, 2.0, -2.0, 1.0])
    logprobs = ratio.log().requires_grad_()
    loss, clipped = grpo_loss(logprobs, torch.zeros(5), advantages, Clip(0.2, 0.28))
    # min(r A, clip(r, .8, 1.28) A): 2.56, -3, 1, -1.6, 1.1
    assert loss.item() == pytest.approx(-(2.56 - 3.0 + 1.0 - 1.6 + 1.1), abs=1e-5)
    assert clipped.item() == 2
    loss.backward()
    # Where the bound holds there is no gradient, elsewhere d(r A)/d logp = r A.
    assert torch.allclose(logprobs.grad, -torch.tensor([0.0, -3.0, 1.0, 0.0, 1.1]), atol=1e-5)


def test_grpo_on_policy_is_the_policy_gradient() -> None:
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss, clipped = grpo_loss(logprobs, logprobs.detach(), torch.tensor([0.5, -0.25]), Clip())
    loss.backward()
    assert logprobs.grad.tolist() == [-0.5, 0.25] and clipped.item() == 0


def test_sft_loss_is_a_sum() -> None:
    assert sft_loss(torch.tensor([-1.0, -2.5])).item() == 3.5


def test_mismatch_by_hand() -> None:
    found = mismatch(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -2.5]))
    assert found.max == 0.5 and found.mean == 0.25
    assert found.k3 == pytest.approx((math.exp(0.5) - 1 - 0.5) / 2)


def test_schedule_by_hand() -> None:
    schedule = Schedule(peak=1.0, warmup=2, final=0.5)
    assert [schedule.at(step, 6) for step in range(1, 7)] == [0.5, 1.0, 0.875, 0.75, 0.625, 0.5]
    assert Schedule(3.0).at(1, 10) == 3.0
