"""Log-probs of targets and entropies from logits whose vocabulary is split over the tensor-parallel group.

Shapes: N targets, V this process's part of the vocabulary.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy


def target_logprobs(logits_NV: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """Natural log-prob of each label under softmax(logits), float32, differentiable.

    Args:
        logits_NV: already divided by the temperature. Overwritten if it is float32.
        labels_N: ids in the whole vocabulary.
    """
    return -vocab_parallel_cross_entropy(logits_NV.float()[:, None], labels_N[:, None])[:, 0]


def bar(logits_NV: torch.Tensor, barred_N: torch.Tensor) -> torch.Tensor:
    """Logits without the token that could not be drawn in a target's place.

    Args:
        logits_NV: float32.
        barred_N: ids in the whole vocabulary, -1 for none.
    """
    first = parallel_state.get_tensor_model_parallel_rank() * logits_NV.shape[1]
    here_N = (barred_N >= 0) & (barred_N >= first) & (barred_N < first + logits_NV.shape[1])
    rows_N = here_N.nonzero()[:, 0]
    # Finite, so that an entropy's 0 x logit stays 0.
    lowest = torch.full_like(rows_N, -1e30, dtype=logits_NV.dtype)
    return logits_NV.index_put((rows_N, barred_N[rows_N] - first), lowest)


@torch.no_grad()
def entropies(logits_NV: torch.Tensor, chunk: int = 4096) -> torch.Tensor:
    """Entropy of softmax(logits) in nats, float32, `chunk` targets at a time."""
    group = parallel_state.get_tensor_model_parallel_group()

    def total(values: torch.Tensor, op: dist.ReduceOp.RedOpType) -> torch.Tensor:
        if group.size() > 1:
            dist.all_reduce(values, op=op, group=group)
        return values

    found = []
    for part_NV in logits_NV.split(chunk):
        wide_NV = part_NV.float()
        wide_NV = wide_NV - total(wide_NV.amax(-1), dist.ReduceOp.MAX)[:, None]
        weights_NV = wide_NV.exp()
        sum_N = total(weights_NV.sum(-1), dist.ReduceOp.SUM)
        mean_N = total((weights_NV * wide_NV).sum(-1), dist.ReduceOp.SUM) / sum_N
        found.append(sum_N.log() - mean_N)
    return torch.cat(found)
