"""Rewards, an advantage and a surrogate of your own, as docs/rl.md describes them.

parallel-r1 curriculum recipes/tiny/demo.yaml 'stages.rl_easy.reward={components: [{term: accuracy},
    {term: "examples.own_reward:balanced", weight: 0.1}]}'
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from megatron_parallel_r1.rewards.base import JudgedTrace


def balanced(judged: JudgedTrace, step: int) -> float | None:
    """The shortest path of each block as a share of its longest; 0 without a block."""
    if any(block.summary is None for block in judged.blocks):
        return None  # a limit cut the trace inside a block: no signal
    shares = [min(block.path_tokens) / max(1, *block.path_tokens) for block in judged.blocks]
    return sum(shares) / len(shares) if shares else 0.0


async def brief(
    completions: Sequence[str], judged: Sequence[JudgedTrace], step: int, **columns: Any
) -> list[float]:
    """Minus the length in thousands of characters, from step 2 on; `await` a judge here."""
    return [-len(text) / 1000 if step >= 2 else 0.0 for text in completions]


def against_best(rewards_PG: np.ndarray) -> np.ndarray:
    """Each reward minus the best of its group."""
    return rewards_PG - rewards_PG.max(1, keepdims=True)


def unclipped(
    logprobs_N: torch.Tensor, ratio_N: torch.Tensor, values: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """The policy gradient without a bound on the ratio."""
    return ratio_N * values["advantage"]
