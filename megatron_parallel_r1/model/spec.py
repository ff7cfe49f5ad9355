"""The layer of the model: Megatron's local layer with our attention under a layout and our RMSNorm.

Shapes: T tokens (of this process), B rows (1), C channels.
"""

from __future__ import annotations

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_parallel_r1.model.attention import PathAttention


class RMSNorm(nn.Module):
    """Root mean square norm with float32 statistics, equal to Hugging Face's Qwen3RMSNorm.

    Megatron's torch norm refuses sequence parallelism; all it takes is the mark on the weight, by which
    Megatron sums the gradients of the tensor group.

    Args:
        config: says whether the weight's gradients are partial sums.
        hidden_size: C.
        eps: added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        device = torch.cuda.current_device()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x_TBC: Tensor) -> Tensor:
        """Normalizes the last dimension of a tensor of any shape; keeps shape and dtype."""
        wide_TBC = x_TBC.float()
        scale_TB1 = torch.rsqrt(wide_TBC.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide_TBC * scale_TB1).to(x_TBC.dtype)


def local_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, made of Megatron's own modules that need nothing beyond torch."""
    layer = get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PathAttention
    attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, vp_stage), layer_norm=RMSNorm
    )
