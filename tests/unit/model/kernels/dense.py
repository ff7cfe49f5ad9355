"""Attention from its definition: the whole mask, the whole softmax, in the dtype that it is given."""

from typing import NamedTuple

import torch
from torch import Tensor


class Attended(NamedTuple):
    """Output [Q, H, D], log of the sum of exponentials [H, Q], gradients of queries, keys and values."""

    out: Tensor
    lse: Tensor
    query_grad: Tensor
    key_grad: Tensor
    value_grad: Tensor


def dense_attention(
    query_QHD: Tensor, key_LGD: Tensor, value_LGD: Tensor, sees_QL: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and log of the sum of exponentials, differentiable."""
    repeats = query_QHD.shape[1] // key_LGD.shape[1]
    key_LHD, value_LHD = (x.repeat_interleave(repeats, 1) for x in (key_LGD, value_LGD))
    scores_HQL = torch.einsum("qhd,khd->hqk", query_QHD, key_LHD) * scale
    scores_HQL = scores_HQL.masked_fill(~sees_QL, -torch.inf)
    out_QHD = torch.einsum("hqk,khd->qhd", scores_HQL.softmax(-1), value_LHD)
    return out_QHD, scores_HQL.logsumexp(-1)


def dense_attended(
    query_QHD: Tensor, key_LGD: Tensor, value_LGD: Tensor, grad_QHD: Tensor, sees_QL: Tensor, scale: float
) -> Attended:
    """All that the kernels compute, in float64, of inputs of any dtype."""
    leaves = [x.double().requires_grad_() for x in (query_QHD, key_LGD, value_LGD)]
    out_QHD, lse_HQ = dense_attention(*leaves, sees_QL, scale)
    out_QHD.backward(grad_QHD.double())
    return Attended(out_QHD.detach(), lse_HQ.detach(), *(leaf.grad for leaf in leaves))
