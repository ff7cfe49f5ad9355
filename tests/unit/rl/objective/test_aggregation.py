"""Weights of targets: each mean of the papers is the trainer's mean with weights, however rows are split."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_parallel_r1.config.objective import Aggregation
from megatron_parallel_r1.rl.objective.aggregation import target_weights

LOSSES = [[1.0, 3.0], [5.0], [2.0, 4.0, 6.0, 8.0]]
TARGETS = np.array([2, 1, 4])


def by_trainer(weights_T: np.ndarray) -> float:
    """The trainer's mean: the sum over all targets, divided by their number."""
    weighted = sum(w * sum(losses) for w, losses in zip(weights_T, LOSSES, strict=True))
    return weighted / 7


@pytest.mark.parametrize(
    ("aggregation", "weights", "mean"),
    [
        ("token", [1.0, 1.0, 1.0], 29 / 7),
        # 7 / (3 x 2), 7 / (3 x 1), 7 / (3 x 4); the mean of 2, 5 and 5
        ("sequence", [7 / 6, 7 / 3, 7 / 12], 12 / 3),
        # 7 / (3 x 10); sums 4, 5 and 20, each over 10, and their mean
        ("constant", [7 / 30] * 3, (0.4 + 0.5 + 2.0) / 3),
    ],
)
def test_weights_by_hand(aggregation: Aggregation, weights: list[float], mean: float) -> None:
    found_T = target_weights(TARGETS, aggregation, 10)
    assert found_T.tolist() == pytest.approx(weights, rel=1e-15)
    assert by_trainer(found_T) == pytest.approx(mean, rel=1e-15)


@pytest.mark.parametrize(
    ("aggregation", "mean"),
    [("token", 24 / 6), ("sequence", (2 + 5) / 2), ("constant", (0.4 + 2.0) / 2)],
)
def test_masked_traces_are_as_if_they_were_not_there(aggregation: Aggregation, mean: float) -> None:
    found_T = target_weights(TARGETS, aggregation, 10, np.array([True, False, True]))
    assert found_T[1] == 0
    assert by_trainer(found_T) == pytest.approx(mean, rel=1e-15)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_nothing_to_train_on_weighs_nothing(aggregation: Aggregation) -> None:
    assert target_weights(TARGETS, aggregation, 10, np.zeros(3, bool)).tolist() == [0.0, 0.0, 0.0]
    # A trace without targets is no trace to take a mean over.
    assert target_weights(np.array([0, 2]), aggregation, 2).tolist() == [0.0, 1.0]
