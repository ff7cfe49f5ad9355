"""Draws one token per row. A draw depends on the row's logits, seed and position alone, not on the batch.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from megatron_parallel_r1.utils.devices import to_device


def sample_tokens(
    logits_NV: torch.Tensor,
    uniform_N: NDArray[np.float64],
    temperature_N: NDArray[np.float64],
    top_k_N: NDArray[np.int64],
    top_p_N: NDArray[np.float64],
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Tokens and their log-probs (of the distribution that `rollout.engine.Completion` defines).

    Args:
        logits_NV: float32; -inf for suppressed tokens.
        uniform_N: from [0, 1); the same number draws the same token.
    """
    is_greedy_N = temperature_N == 0
    temperature_N = np.where(is_greedy_N, 1.0, temperature_N)
    if (temperature_N != 1.0).any():
        logits_NV = logits_NV / _like(logits_NV, temperature_N)[:, None].to(logits_NV.dtype)
    # Not torch.log_softmax, whose sum on a CPU loses digits with the vocabulary, always to one side.
    below_NV = logits_NV - logits_NV.amax(-1, keepdim=True)
    weights_NV = below_NV.exp()
    logsum_N = weights_NV.sum(-1).log()
    cumulative_NV = _top(weights_NV, top_k_N, top_p_N).cumsum(-1, dtype=torch.float64)
    target_N1 = (_like(logits_NV, uniform_N) * cumulative_NV[:, -1])[:, None]
    tokens_N1 = torch.searchsorted(cumulative_NV, target_N1, right=True).clamp(max=logits_NV.shape[1] - 1)
    if is_greedy_N.any():
        tokens_N1 = torch.where(
            _like(logits_NV, is_greedy_N)[:, None], logits_NV.argmax(-1, keepdim=True), tokens_N1
        )
    logprobs_N = below_NV.gather(1, tokens_N1)[:, 0] - logsum_N
    # One copy, for which the host waits; float64 holds every token exactly.
    tokens_N, logprobs_N = torch.stack([tokens_N1[:, 0].double(), logprobs_N.double()]).cpu().numpy()
    return tokens_N.astype(np.int64), logprobs_N


def uniform_draws(seeds: ArrayLike, positions: ArrayLike) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), one for each (seed, position): splitmix64 (Steele et al., 2014)."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        state = np.asarray(seeds, np.uint64) + golden * (np.asarray(positions, np.uint64) + np.uint64(1))
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _top(weights_NV: torch.Tensor, top_k_N: NDArray[np.int64], top_p_N: NDArray[np.float64]) -> torch.Tensor:
    """Zeroes the weights that top-k (0: all) and then top-p drop; ties at the edge stay in order."""
    vocabulary = weights_NV.shape[1]
    if ((top_k_N == 0) | (top_k_N >= vocabulary)).all() and (top_p_N == 1.0).all():
        return weights_NV
    sorted_NV, order_NV = weights_NV.sort(dim=-1, descending=True, stable=True)
    top_k_N1 = _like(weights_NV, np.where(top_k_N == 0, vocabulary, top_k_N))[:, None]
    top_p_N1 = _like(weights_NV, top_p_N)[:, None]
    ranks_V = torch.arange(vocabulary, device=weights_NV.device)
    sorted_NV = sorted_NV * (ranks_V < top_k_N1)
    share_NV = sorted_NV / sorted_NV.sum(-1, keepdim=True)
    # The token that crosses top-p stays in, hence the share before each token.
    kept_NV = (share_NV.cumsum(-1) - share_NV < top_p_N1) | (top_p_N1 >= 1)
    return torch.zeros_like(weights_NV).scatter(1, order_NV, sorted_NV * kept_NV)


def _like(tensor: torch.Tensor, numbers: NDArray[np.generic]) -> torch.Tensor:
    return to_device(numbers, tensor.device)
