"""The losses: how the formulas are put together, by hand, and over processes that share a row."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_parallel_r1.config.objective import Objective
from megatron_parallel_r1.rl.objective.aggregation import target_weights
from megatron_parallel_r1.rl.objective.loss import policy_loss
from megatron_parallel_r1.train.micro_batch import Segments
from tests.unit.rl.objective import two_processes

RATIO = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1], dtype=torch.float64)
ADVANTAGE = torch.tensor([2.0, -2.0, 2.0, -2.0, 1.0], dtype=torch.float64)
GAIN = [2.56, -3.0, 1.0, -1.6, 1.1]  # test_surrogate.py
SLOPE = [0.0, -3.0, 1.0, 0.0, 1.1]
MEMBERS = Segments(torch.tensor([0, 0, 1, 1, 1]), 2)


def values(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    zeros_N, ones_N = torch.zeros_like(RATIO), torch.ones_like(RATIO)
    return {"advantage": ADVANTAGE, "weight": ones_N, "old": zeros_N} | more


def run(
    objective: Objective, inputs: dict[str, torch.Tensor], entropies: torch.Tensor | None = None
) -> tuple[float, list[float], dict[str, float]]:
    """The loss, its gradient, and what it reports but for `kl_old`."""
    logprobs_N = RATIO.log().requires_grad_()
    entropies_N = torch.zeros_like(RATIO) if entropies is None else entropies
    loss, sums = policy_loss(logprobs_N, entropies_N, inputs, objective, MEMBERS)
    loss.backward()
    reported = {name: value.item() for name, value in sums.items() if name != "kl_old"}
    return loss.item(), logprobs_N.grad.tolist(), reported


def test_defaults_are_grpo_clipped_higher() -> None:
    loss, grad, sums = run(Objective(), values())
    assert loss == pytest.approx(-sum(GAIN))
    assert grad == pytest.approx([-slope for slope in SLOPE])
    assert sums == {"clipped_low": 1, "clipped_high": 1, "trained": 5}


@pytest.mark.parametrize("ratio", ["token", "sequence", "sequence_token"])
@pytest.mark.parametrize("surrogate", ["ppo", "cispo"])
def test_on_policy_every_objective_is_the_policy_gradient(ratio: Any, surrogate: Any) -> None:
    logprobs_N = torch.tensor([-1.0, -2.0, -0.3], dtype=torch.float64, requires_grad=True)
    advantages_N = torch.tensor([0.5, 0.5, -0.25], dtype=torch.float64)
    inputs = {"advantage": advantages_N, "weight": torch.ones(3, dtype=torch.float64)}
    objective = Objective(ratio=ratio, surrogate=surrogate)
    loss, _ = policy_loss(logprobs_N, torch.zeros(3), inputs, objective, Segments(torch.tensor([0, 0, 1]), 2))
    loss.backward()
    assert logprobs_N.grad.tolist() == pytest.approx([-0.5, -0.5, 0.25])


def test_weights_scale_and_mask() -> None:
    weight_N = torch.tensor([2.0, 1.0, 1.0, 0.0, 0.5], dtype=torch.float64)
    loss, grad, sums = run(Objective(), values(weight=weight_N))
    assert loss == pytest.approx(-(2 * 2.56 - 3.0 + 1.0 + 0.5 * 1.1))
    assert grad == pytest.approx([0.0, 3.0, -1.0, 0.0, -0.55])
    # The one that was clipped below has no weight, and so is not counted.
    assert sums == {"clipped_low": 0, "clipped_high": 1, "trained": 4}


def test_sequence_mean_of_gspo_is_the_paper_s_mean_over_traces() -> None:
    # Traces of two and three targets with advantages 1 and -2, all ratios within wide bounds.
    logs = [0.1, 0.3, 0.2, -0.1, 0.2]
    first, second = math.exp(0.4 / 2), math.exp(0.3 / 3)
    weights = target_weights(np.array([2, 3]), "sequence")
    inputs = {
        "advantage": torch.tensor([1.0, 1.0, -2.0, -2.0, -2.0], dtype=torch.float64),
        "weight": torch.tensor([weights[0]] * 2 + [weights[1]] * 3),
        "old": torch.zeros(5, dtype=torch.float64),
    }
    logprobs_N = torch.tensor(logs, dtype=torch.float64, requires_grad=True)
    loss, _ = policy_loss(logprobs_N, torch.zeros(5), inputs, Objective(ratio="sequence"), MEMBERS)
    loss.backward()
    # Divided by the five targets, as the trainer does: eq. 5 of the paper and its gradient, eq. 10.
    assert loss.item() / 5 == pytest.approx(-(first * 1 + second * -2) / 2)
    expected = [-(first / 2) / 2] * 2 + [(2 * second / 3) / 2] * 3
    assert (logprobs_N.grad / 5).tolist() == pytest.approx(expected)


def test_truncated_importance_sampling_weighs_the_gain() -> None:
    # Old log-probs are 0: the engine's ratios are 1, 4, 0.5, 2, 0.25.
    engine_N = -torch.tensor([1.0, 4.0, 0.5, 2.0, 0.25], dtype=torch.float64).log()
    loss, grad, sums = run(Objective(correction="truncate"), values(engine=engine_N))
    weights = [1.0, 2.0, 0.5, 2.0, 0.25]
    assert loss == pytest.approx(-sum(w * gain for w, gain in zip(weights, GAIN, strict=True)))
    assert grad == pytest.approx([-w * slope for w, slope in zip(weights, SLOPE, strict=True)])
    assert sums == pytest.approx(
        {"correction": 5.75, "correction_square": 1 + 4 + 0.25 + 4 + 0.0625, "corrected": 1}
        | {"clipped_low": 1, "clipped_high": 1, "trained": 5}
    )


def test_masked_importance_sampling_by_trace() -> None:
    # Products: 1 x 4 = 4 is out of [0.5, 2]; 0.5 x 2 x 0.8 = 0.8 is within.
    engine_N = -torch.tensor([1.0, 4.0, 0.5, 2.0, 0.8], dtype=torch.float64).log()
    objective = Objective(correction="mask", correction_level="sequence")
    loss, grad, sums = run(objective, values(engine=engine_N))
    assert loss == pytest.approx(-0.8 * (1.0 - 1.6 + 1.1))
    assert grad == pytest.approx([0.0, 0.0, -0.8, 0.0, -0.88])
    assert sums["corrected"] == 2 and sums["correction"] == pytest.approx(2.4)


def test_kl_in_the_loss_by_hand() -> None:
    reference_N = RATIO.log() - 0.5
    loss, grad, sums = run(Objective(kl="k2", kl_coefficient=0.1), values(reference=reference_N))
    assert loss == pytest.approx(-sum(GAIN) + 0.1 * 5 * 0.125)
    assert grad == pytest.approx([-slope + 0.1 * 0.5 for slope in SLOPE])
    assert sums["kl"] == pytest.approx(5 * 0.125)


def test_how_far_a_step_has_moved_the_policy_by_hand() -> None:
    logprobs_N = RATIO.log().requires_grad_()
    inputs = values(weight=torch.tensor([1.0, 1.0, 1.0, 0.0, 2.0], dtype=torch.float64))
    _, sums = policy_loss(logprobs_N, torch.zeros_like(RATIO), inputs, Objective(), MEMBERS)
    # r - 1 - ln r of the targets that count: 1.5 twice, 0.5 and 1.1.
    expected = 2 * (0.5 - math.log(1.5)) + (-0.5 - math.log(0.5)) + (0.1 - math.log(1.1))
    assert sums["kl_old"].item() == pytest.approx(expected) and not sums["kl_old"].requires_grad


def test_kl_in_the_reward_is_no_term_of_the_loss() -> None:
    loss, _, sums = run(Objective(kl="k1", kl_in="reward"), values())
    assert loss == pytest.approx(-sum(GAIN)) and "kl" not in sums


def test_entropy_bonus_by_hand() -> None:
    entropies_N = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64, requires_grad=True)
    weight_N = torch.tensor([1.0, 1.0, 1.0, 1.0, 2.0], dtype=torch.float64)
    loss, _, _ = run(Objective(entropy_coefficient=0.01), values(weight=weight_N), entropies_N)
    assert loss == pytest.approx(-(sum(GAIN) + 1.1) - 0.01 * (15 + 5))
    assert entropies_N.grad.tolist() == pytest.approx([-0.01, -0.01, -0.01, -0.01, -0.02])


def test_dual_clip_and_cispo_are_reached_by_name() -> None:
    inputs = values(advantage=torch.full_like(RATIO, -1.0))
    # 1.4 x -1 bounds the ratios of 1.5; 0.5 is held at 0.8.
    loss, _, sums = run(Objective(dual_clip=1.4), inputs)
    assert loss == pytest.approx(1.4 + 1.4 + 0.8 + 0.8 + 1.1) and sums["clipped_dual"] == 2
    _, grad, sums = run(Objective(surrogate="cispo"), inputs)
    assert grad == pytest.approx([1.28, 1.28, 0.8, 0.8, 1.1])
    assert sums == {"clipped_low": 2, "clipped_high": 2, "trained": 5}


def test_an_empty_micro_batch_has_a_loss_of_nothing() -> None:
    empty_N = torch.zeros(0, requires_grad=True)
    names = ("advantage", "weight", "old", "engine", "reference")
    inputs = {name: torch.zeros(0) for name in names}
    objective = Objective(ratio="sequence", correction="mask", correction_level="sequence", kl="k3")
    segments = Segments(torch.zeros(0, dtype=torch.int64), 0)
    loss, sums = policy_loss(empty_N, torch.zeros(0), inputs, objective, segments)
    loss.backward()
    assert loss.item() == 0 and empty_N.grad.shape == (0,) and not any(s.item() for s in sums.values())


@pytest.mark.slow
def test_two_processes_that_share_rows_have_the_loss_and_gradient_of_one(tmp_path: Path) -> None:
    """Not covered: NCCL, and Megatron's schedule around it (tests/parallel)."""
    alone = two_processes.losses(None)
    places = [tmp_path / "0.json", tmp_path / "1.json"]
    children = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.unit.rl.objective.two_processes",
                str(rank),
                str(tmp_path / "store"),
                place,
            ],
            cwd=Path(__file__).resolve().parents[4],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, place in enumerate(places)
    ]
    try:
        errors = [child.communicate(timeout=600)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], "\n".join(errors)
    halves = [json.loads(place.read_text()) for place in places]
    for name, whole in alone.items():
        first, second = (half[name] for half in halves)
        # float64 sums in another order
        assert first["loss"] + second["loss"] == pytest.approx(whole["loss"], rel=1e-12), name
        assert first["grad"] + second["grad"] == pytest.approx(whole["grad"], rel=1e-12), name
        assert {key: first["sums"][key] + second["sums"][key] for key in first["sums"]} == pytest.approx(
            whole["sums"], rel=1e-12
        ), name
