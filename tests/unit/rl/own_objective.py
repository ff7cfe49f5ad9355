"""Formulas as a user writes them, right and wrong; named `module:function` in test_learner.py."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import numpy as np
import torch

Values = Mapping[str, torch.Tensor]


def dr_grpo(rewards_PG: np.ndarray) -> np.ndarray:
    return rewards_PG - rewards_PG.mean(1, keepdims=True)


def scalar(rewards_PG: np.ndarray) -> float:
    return 1.0


def infinite(rewards_PG: np.ndarray) -> np.ndarray:
    return rewards_PG * np.inf


def raises(rewards_PG: np.ndarray) -> np.ndarray:
    raise RuntimeError("not today")


def clipped(logprobs_N: torch.Tensor, ratio_N: torch.Tensor, values: Values) -> torch.Tensor:
    advantages_N = values["advantage"]
    return torch.minimum(ratio_N * advantages_N, ratio_N.clamp(1 - 0.2, 1 + 0.28) * advantages_N)


def detached(logprobs_N: torch.Tensor, ratio_N: torch.Tensor, values: Values) -> torch.Tensor:
    return clipped(logprobs_N, ratio_N, values).detach()


def total(logprobs_N: torch.Tensor, ratio_N: torch.Tensor, values: Values) -> torch.Tensor:
    return clipped(logprobs_N, ratio_N, values).sum()


def exits(logprobs_N: torch.Tensor, ratio_N: torch.Tensor, values: Values) -> torch.Tensor:
    sys.exit(1)


def in_numpy(logprobs_N: torch.Tensor, ratio_N: torch.Tensor, values: Values) -> np.ndarray:
    return np.ones(len(logprobs_N))


class Wordless(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def wordless(rewards_PG: np.ndarray) -> np.ndarray:
    raise Wordless


def over_the_step(rewards_PG: np.ndarray) -> np.ndarray:
    return rewards_PG - rewards_PG.mean()
