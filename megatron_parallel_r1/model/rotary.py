"""Rotary frequencies by the position that each token was given, where Megatron's own count 0, 1, 2, …

Shapes: L tokens of a row, R rotary dimensions of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_parallel_r1.model.config import ModelConfig


class PositionRotary(nn.Module):
    """Angles of rotary embeddings (arXiv 2104.09864), bit-equal to transformers' in float32.

    Args:
        shape: says how fast each pair of dimensions turns; all dimensions of a head rotate.
    """

    def __init__(self, shape: ModelConfig) -> None:
        super().__init__()
        self.shape = shape

    @torch.no_grad()
    def forward(self, positions_1L: Tensor) -> Tensor:
        """Returns the angles [L, 1, 1, R] in float32, as Megatron's attention takes them.

        They are computed anew, never kept in a buffer: a model cast to bfloat16 must not round them.
        """
        frequencies_r = self.shape.rope_frequencies().to(positions_1L.device)
        angles_Lr = positions_1L[0, :, None].float() * frequencies_r
        return torch.cat((angles_Lr, angles_Lr), dim=-1)[:, None, None, :]
