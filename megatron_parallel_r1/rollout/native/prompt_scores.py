"""Log-probs of given tokens, and the most likely tokens in their places.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite

import torch

from megatron_parallel_r1.rollout.engine import TokenScore


@dataclass(slots=True)
class PromptScores:
    """The scores of a prompt's tokens behind the first, complete once all its logits were added."""

    tokens: list[int]
    alternatives: int
    scores: list[TokenScore] = field(default_factory=list)

    def add(self, logits_NV: torch.Tensor) -> None:
        """Adds the logits behind each of the prompt's next tokens; those behind the last score nothing."""
        begin = len(self.scores) + 1
        targets = self.tokens[begin : begin + len(logits_NV)]
        logprobs_NV = log_softmax(logits_NV[: len(targets)])
        targets_N1 = torch.tensor(targets, device=logits_NV.device)[:, None]
        logprobs = logprobs_NV.gather(1, targets_N1)[:, 0].tolist()
        self.scores += map(TokenScore, logprobs, _best(logprobs_NV, [self.alternatives] * len(targets)))


def most_likely(logits_NV: torch.Tensor, counts: Sequence[int]) -> list[tuple[tuple[int, float], ...]]:
    """The `counts[i]` most likely tokens of row i with their log-probs, best first."""
    return _best(log_softmax(logits_NV), counts)


def log_softmax(logits_NV: torch.Tensor) -> torch.Tensor:
    """Log-probs as `sampler.sample_tokens` computes them, so that those of one token are the same number."""
    below_NV = logits_NV - logits_NV.amax(-1, keepdim=True)
    return below_NV - below_NV.exp().sum(-1, keepdim=True).log()


def _best(logprobs_NV: torch.Tensor, counts: Sequence[int]) -> list[tuple[tuple[int, float], ...]]:
    most = min(max(counts, default=0), logprobs_NV.shape[1])
    values, tokens = (part.tolist() for part in logprobs_NV.topk(most, dim=-1))
    pairs = [list(zip(*row, strict=True)) for row in zip(tokens, values, strict=True)]
    # A suppressed token has -inf, which JSON cannot say.
    return [
        tuple((token, value) for token, value in row[:count] if isfinite(value))
        for row, count in zip(pairs, counts, strict=True)
    ]
