"""Rotary frequencies by the position that each token was given, where Megatron's own count 0, 1, 2, …

Shapes: L tokens of a row, R rotary dimensions of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PositionRotary(nn.Module):
    """Angles of rotary embeddings (arXiv 2104.09864), bit-equal to transformers' Qwen3 in float32.

    Args:
        head_dim: R, all dimensions of a head rotate.
        theta: the base of the frequencies.
    """

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.theta = theta

    @torch.no_grad()
    def forward(self, positions_1L: Tensor) -> Tensor:
        """Returns the angles [L, 1, 1, R] in float32, as Megatron's attention takes them.

        They are computed anew, never kept in a buffer: a model cast to bfloat16 must not round them.
        """
        exponents_r = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=positions_1L.device)
        frequencies_r = 1.0 / (self.theta ** (exponents_r / self.head_dim))
        angles_Lr = positions_1L[0, :, None].float() * frequencies_r
        return torch.cat((angles_Lr, angles_Lr), dim=-1)[:, None, None, :]
