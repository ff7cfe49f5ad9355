"""The second half of a layer: one SwiGLU (arXiv 2002.05202), or many of which a token goes through a few.

Shapes: N rows, E hidden size, F feed-forward size, X experts, C experts of a token, M rows of one expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True, slots=True)
class Dense:
    """One for all tokens; in a team each process has its own features, and their sum is the whole."""

    gate_up_FE: torch.Tensor
    down_EF: torch.Tensor

    def __call__(self, hidden_NE: torch.Tensor) -> torch.Tensor:
        gate_NF, up_NF = F.linear(hidden_NE, self.gate_up_FE).chunk(2, dim=-1)
        return F.linear(F.silu(gate_NF) * up_NF, self.down_EF)


@dataclass(frozen=True, slots=True)
class Experts:
    """The likeliest `per_token` of a router's choices, weighted; no expert turns a token away.

    As in transformers' Qwen3MoeTopKRouter: a float32 softmax over all experts, of which the chosen ones'
    weights are scaled to sum to 1 if `renormalized`.
    """

    router_XE: torch.Tensor
    experts: list[Dense]
    per_token: int
    renormalized: bool

    def __call__(self, hidden_NE: torch.Tensor) -> torch.Tensor:
        weights_NX = F.linear(hidden_NE, self.router_XE).float().softmax(-1)
        weights_NC, chosen_NC = weights_NX.topk(self.per_token, -1)
        if self.renormalized:
            weights_NC = weights_NC / weights_NC.sum(-1, keepdim=True)
        weights_NC = weights_NC.to(hidden_NE.dtype)
        out_NE = torch.zeros_like(hidden_NE)
        for expert in chosen_NC.unique().tolist():
            rows_M, places_M = (chosen_NC == expert).nonzero(as_tuple=True)
            made_ME = self.experts[expert](hidden_NE[rows_M])
            out_NE.index_add_(0, rows_M, made_ME * weights_NC[rows_M, places_M, None])
        return out_NE
