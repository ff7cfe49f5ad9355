"""Draws one token a row. A row's draw depends on its logits, seed and position alone, not on the batch.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_parallel_r1.rollout.base import Sampling


def draw(
    logits_NV: torch.Tensor,
    samplings: Sequence[Sampling],
    positions: Sequence[int],
    suppress: Sequence[frozenset[int]],
) -> tuple[list[int], list[float]]:
    """Tokens and their log-probs (rollout.base.Completion says of which distribution)."""
    temperatures_N = torch.tensor([s.temperature or 1.0 for s in samplings], device=logits_NV.device)
    logits_NV = _suppressed(logits_NV.float() / temperatures_N[:, None], suppress)
    logprobs_NV = torch.log_softmax(logits_NV, dim=-1)
    weights_NV = logprobs_NV.exp()
    greedy_N = weights_NV.argmax(-1)
    weights_NV = _top(weights_NV, samplings)
    cumulative_NV = weights_NV.double().cumsum(-1)
    uniform_N = torch.from_numpy(uniforms([s.seed for s in samplings], positions)).to(logits_NV.device)
    target_N1 = (uniform_N * cumulative_NV[:, -1])[:, None]
    drawn_N = torch.searchsorted(cumulative_NV, target_N1, right=True)[:, 0]
    is_greedy_N = torch.tensor([s.temperature == 0 for s in samplings], device=logits_NV.device)
    tokens_N = torch.where(is_greedy_N, greedy_N, drawn_N.clamp(max=logits_NV.shape[1] - 1))
    return tokens_N.tolist(), logprobs_NV.gather(1, tokens_N[:, None])[:, 0].tolist()


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), one for each (seed, position): splitmix64 (Steele et al., 2014)."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        state = np.asarray(seeds, np.uint64) + golden * (np.asarray(positions, np.uint64) + np.uint64(1))
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _suppressed(logits_NV: torch.Tensor, suppress: Sequence[frozenset[int]]) -> torch.Tensor:
    rows = [row for row, ids in enumerate(suppress) for _ in ids]
    if not rows:
        return logits_NV
    columns = [token for ids in suppress for token in ids]
    return logits_NV.index_put(
        (torch.tensor(rows), torch.tensor(columns)), torch.tensor(float("-inf")).to(logits_NV)
    )


def _top(weights_NV: torch.Tensor, samplings: Sequence[Sampling]) -> torch.Tensor:
    """Zeroes what top-k and then top-p (on what top-k left) drop; ties at the edge are kept in order."""
    vocabulary = weights_NV.shape[1]
    if all(s.top_k in (0, vocabulary) and s.top_p == 1.0 for s in samplings):
        return weights_NV
    sorted_NV, order_NV = weights_NV.sort(dim=-1, descending=True, stable=True)
    top_k_N = torch.tensor([s.top_k or vocabulary for s in samplings], device=weights_NV.device)
    top_p_N = torch.tensor([s.top_p for s in samplings], device=weights_NV.device)
    ranks_V = torch.arange(vocabulary, device=weights_NV.device)
    sorted_NV = sorted_NV * (ranks_V < top_k_N[:, None])
    share_NV = sorted_NV / sorted_NV.sum(-1, keepdim=True)
    # The likeliest token that crosses top-p stays in, hence the share before each token.
    kept_NV = (share_NV.cumsum(-1) - share_NV < top_p_N[:, None]) | (top_p_N[:, None] >= 1)
    return torch.zeros_like(weights_NV).scatter(1, order_NV, sorted_NV * kept_NV)
