"""Log-probs of targets and entropies from hidden states, with the vocabulary sharded over the tensor group.

Logits are computed for the targets alone, in chunks, and recomputed in backward, so memory grows neither with
row length x vocabulary nor with targets x vocabulary. No rank holds logits of another rank's part of the
vocabulary: the group exchanges sums of [N].

Shapes: N targets, C targets of a chunk, E hidden size, V this rank's part of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

# Logits of a chunk at least: 64 MiB in float32; on a CPU as many as its caches hold.
CHUNK_LOGITS, CPU_CHUNK_LOGITS = 2**24, 2**20
# Float32 tensors of a chunk's size that exist at once in backward: logits and gradient of a chunk, the logits
# of the next one, and a temporary.
CHUNKS_ALIVE = 4
# Logit of a token that cannot be drawn; finite, so that its share 0 x logit of an entropy stays 0.
NEVER = -1e30


@dataclass(frozen=True, slots=True)
class LogprobQuery:
    """The log-probs to compute from each hidden state.

    Attributes:
        labels_N: ids of the targets in the whole vocabulary.
        suppressed_N: the token that could not be drawn there, -1 where every token could.
        temperature: divisor of the logits.
        vocab: size of the vocabulary; further rows of the head are padding.
        chunk: targets per chunk; None: `chunk_targets`.
    """

    labels_N: Tensor
    suppressed_N: Tensor
    temperature: float
    vocab: int
    chunk: int | None = None


def target_logprobs(hidden_NE: Tensor, head_VE: Tensor, query: LogprobQuery) -> tuple[Tensor, Tensor]:
    """Natural log-prob of each label, and the entropy in nats of the distribution that it is drawn from.

    Both float32 [N] and differentiable. The gradient of `hidden_NE` is this rank's share, to be summed over
    the tensor group (by `PathGPT.whole_hidden`). The softmax is in float32, the product with the head in the
    model's dtype, as in inference engines.
    """
    return _TargetLogprobs.apply(hidden_NE, head_VE, query)


class _TargetLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NE: Tensor, head_VE: Tensor, query: LogprobQuery) -> tuple[Tensor, ...]:
        logprobs_N, entropies_N, logsums_N = (
            hidden_NE.new_empty(len(hidden_NE), dtype=torch.float32) for _ in range(3)
        )
        for part, logits_CV, here_C, column_C in _chunks(hidden_NE, head_VE, query):
            highest_C = _over_group(logits_CV.amax(-1), dist.ReduceOp.MAX)
            # Subtract the highest logit: large logits would cost digits of their differences.
            below_CV = logits_CV.sub_(highest_C[:, None])
            weights_CV = below_CV.exp()
            chosen_C = below_CV.gather(1, column_C[:, None])[:, 0] * here_C
            sums_3C = torch.stack([weights_CV.sum(-1), below_CV.mul_(weights_CV).sum(-1), chosen_C])
            total_C, weighted_C, label_C = _over_group(sums_3C, dist.ReduceOp.SUM)
            logprobs_N[part] = label_C - total_C.log()
            entropies_N[part] = total_C.log() - weighted_C / total_C
            logsums_N[part] = total_C.log() + highest_C
        ctx.save_for_backward(hidden_NE, head_VE, logsums_N, entropies_N)
        ctx.query = query
        ctx.set_materialize_grads(False)
        return logprobs_N, entropies_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_NE, head_VE, logsums_N, entropies_N = ctx.saved_tensors
        logprobs_grad_N, entropies_grad_N = grads
        hidden_grad_NE = torch.empty_like(hidden_NE)
        head_grad_VE = torch.zeros_like(head_VE, dtype=torch.float32)
        for part, logits_CV, here_C, column_C in _chunks(hidden_NE, head_VE, ctx.query):
            logshare_CV = logits_CV.sub_(logsums_N[part, None])
            grad_CV = logshare_CV.exp()
            if entropies_grad_N is None:
                assert logprobs_grad_N is not None, "backward runs for one of the outputs at least"
                grad_CV.mul_(-logprobs_grad_N[part, None])
            else:
                # dH / d logit = -p (log p + H)
                slope_CV = logshare_CV.add_(entropies_N[part, None]).mul_(-entropies_grad_N[part, None])
                if logprobs_grad_N is not None:
                    slope_CV.sub_(logprobs_grad_N[part, None])
                grad_CV.mul_(slope_CV)
            if logprobs_grad_N is not None:
                grad_CV.scatter_add_(1, column_C[:, None], (logprobs_grad_N[part] * here_C)[:, None])
            if ctx.query.temperature != 1:
                grad_CV.div_(ctx.query.temperature)
            grad_CV = grad_CV.to(head_VE.dtype)
            hidden_grad_NE[part] = grad_CV @ head_VE
            head_grad_VE += grad_CV.T @ hidden_NE[part]
        return hidden_grad_NE, head_grad_VE.to(head_VE.dtype), None


def chunk_targets(rows: int, hidden: int, logits: int = CHUNK_LOGITS) -> int:
    """Returns the targets of a chunk for `rows` rows of the head: those of `logits` logits, or more.

    Backward reads and writes the head's float32 gradient once a chunk, so a chunk may need as much memory as
    that gradient: with a large vocabulary few chunks take the place of hundreds.
    """
    return max(1, logits // rows, hidden // CHUNKS_ALIVE)


def _chunks(
    hidden_NE: Tensor, head_VE: Tensor, query: LogprobQuery
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Yields each chunk's slice; its logits [C, V] in float32, which the caller may overwrite; whether its
    labels are among this rank's rows of the head; and their columns there, 0 if they are not."""
    rows = len(head_VE)
    first = parallel_state.get_tensor_model_parallel_rank() * rows
    logits = CPU_CHUNK_LOGITS if hidden_NE.device.type == "cpu" else CHUNK_LOGITS
    size = query.chunk or chunk_targets(rows, hidden_NE.shape[1], logits)
    for start in range(0, len(hidden_NE), size):
        part = slice(start, min(start + size, len(hidden_NE)))
        logits_CV = (hidden_NE[part] @ head_VE.T).float()
        if query.temperature != 1:
            logits_CV.div_(query.temperature)
        logits_CV[:, max(0, query.vocab - first) :] = NEVER
        _suppress(logits_CV, query.suppressed_N[part], first)
        column_C = query.labels_N[part] - first
        here_C = (column_C >= 0) & (column_C < rows)
        yield part, logits_CV, here_C, column_C.where(here_C, 0)


def _suppress(logits_CV: Tensor, suppressed_C: Tensor, first: int) -> None:
    """Sets the logit of each row's suppressed token, if this rank has it, to `NEVER`.

    Writes one logit of every row, so that no shape depends on values: the host would wait for those.
    """
    column_C1 = (suppressed_C - first)[:, None]
    here_C1 = (column_C1 >= 0) & (column_C1 < logits_CV.shape[1]) & (suppressed_C[:, None] >= 0)
    column_C1 = column_C1.where(here_C1, 0)
    logits_CV.scatter_(1, column_C1, logits_CV.gather(1, column_C1).masked_fill(here_C1, NEVER))


def _over_group(values: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() > 1:
        dist.all_reduce(values, op=op, group=group)
    return values
