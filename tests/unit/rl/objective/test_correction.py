"""Importance weights between engine and trainer, and the mismatch, against cases worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_parallel_r1.config.objective import CorrectionLevel
from megatron_parallel_r1.rl.objective.correction import effective_share, engine_ratios, masked, truncated
from megatron_parallel_r1.rl.objective.mismatch import Mismatch, largest_apart, mismatch, mismatch_sums
from megatron_parallel_r1.train.micro_batch import Segments

# Two targets of trace 0 and one of trace 1: trainer - engine is 0.5, -0.1, -1.
TRAINER = torch.tensor([-1.0, -2.0, -1.1], dtype=torch.float64)
ENGINE = torch.tensor([-1.5, -1.0, -1.0], dtype=torch.float64)
MEMBERS = Segments(torch.tensor([0, 1, 0]), 2)


@pytest.mark.parametrize(
    ("level", "logs"),
    [
        ("token", [0.5, -1.0, -0.1]),
        ("sequence", [0.4, -1.0, 0.4]),
        ("geometric", [0.2, -1.0, 0.2]),
    ],
)
def test_engine_ratios_by_hand(level: CorrectionLevel, logs: list[float]) -> None:
    trainer_N = TRAINER.clone().requires_grad_()
    found_N = engine_ratios(trainer_N, ENGINE, level, MEMBERS)
    assert found_N.tolist() == pytest.approx([math.exp(log) for log in logs])
    assert not found_N.requires_grad


def test_truncated_by_hand() -> None:
    weights_N, cut_N = truncated(torch.tensor([0.1, 1.0, 2.0, 2.5]), 2.0)
    assert weights_N.tolist() == pytest.approx([0.1, 1.0, 2.0, 2.0])
    assert cut_N.tolist() == [False, False, False, True]


def test_masked_by_hand() -> None:
    weights_N, cut_N = masked(torch.tensor([0.1, 0.5, 1.25, 5.0, 5.5]), 0.5, 5.0)
    assert weights_N.tolist() == [0.0, 0.5, 1.25, 5.0, 0.0]
    assert cut_N.tolist() == [True, False, False, False, True]


def test_effective_share_by_hand() -> None:
    # Weights 1, 1, 2, 0: (4)² / (4 x 6) = 2/3 of four.
    assert effective_share(mean=1.0, mean_square=1.5) == pytest.approx(2 / 3)
    assert effective_share(mean=0.7, mean_square=0.49) == pytest.approx(1.0)
    assert effective_share(mean=0.0, mean_square=0.0) == 0.0


def test_mismatch_by_hand() -> None:
    found = mismatch(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -2.5]))
    ratio = math.exp(0.5)
    assert found.max == 0.5 and found.mean == 0.25
    assert found.k3 == pytest.approx((ratio - 1 - 0.5) / 2)
    assert found.effective == pytest.approx((1 + ratio) ** 2 / (2 * (1 + ratio**2)))


def test_mismatch_of_parts_is_that_of_the_whole() -> None:
    parts = [slice(0, 2), slice(2, 2), slice(2, 3)]  # one without tokens
    sums: dict[str, float] = {}
    for part in parts:
        for name, value in mismatch_sums(TRAINER[part], ENGINE[part]).items():
            sums[name] = sums.get(name, 0.0) + value.item()
    largest, scale = largest_apart([(TRAINER[part], ENGINE[part]) for part in parts])
    found, whole = Mismatch.of(sums, largest), mismatch(TRAINER, ENGINE)
    assert largest == whole.max == 1.0 and scale == TRAINER.abs().max()
    # Sums of three float64 numbers in another order.
    assert (found.mean, found.k3, found.effective) == pytest.approx(
        (whole.mean, whole.k3, whole.effective), rel=1e-14
    )


def test_no_tokens_no_mismatch() -> None:
    assert mismatch(torch.zeros(0), torch.zeros(0)) == Mismatch(max=0.0, mean=0.0, k3=0.0, effective=1.0)
