"""Layer specs: Megatron's own modules or Transformer Engine's, with attention under a layout.

Megatron's `attention_mask` argument is the layout of the packed row.

Shapes: T tokens (of this rank), B = 1 row, C channels; Q queries of this rank, L keys of the row (more than Q
under context parallelism), H query heads in G groups that share a key/value head, D head dimension, K rows of
the layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_parallel_r1.model.attention.dispatch import Kernel, path_attention
from megatron_parallel_r1.model.layers import Layers

# Megatron-Core 0.16.1 reads this name also where Transformer Engine, which defines it, is absent.
if not hasattr(moe_utils, "te_general_gemm"):
    moe_utils.te_general_gemm = None


class RMSNorm(nn.Module):
    """Root mean square norm with float32 statistics, equal to Hugging Face's Qwen3RMSNorm.

    Megatron's torch norm refuses sequence parallelism; it only takes a mark on the weight, which makes
    Megatron sum its gradients over the tensor group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        device = torch.cuda.current_device()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 - torch declares none

    def forward(self, x_TBC: Tensor) -> Tensor:
        """Normalizes the last dimension of a tensor of any shape; keeps shape and dtype."""
        return _Normalize.apply(x_TBC, self.weight, self.eps)


class _Normalize(torch.autograd.Function):
    """A hand-written backward: autograd's own reads and writes memory twice as often."""

    @staticmethod
    def forward(ctx: Any, x_TBC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
        wide_TBC = x_TBC.float()
        scale_TB1 = torch.rsqrt(wide_TBC.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x_TBC, weight_C, scale_TB1)
        return weight_C * (wide_TBC * scale_TB1).to(x_TBC.dtype)

    @staticmethod
    def backward(ctx: Any, grad_TBC: Tensor) -> tuple[Tensor | None, ...]:
        x_TBC, weight_C, scale_TB1 = ctx.saved_tensors
        unit_TBC = x_TBC.float() * scale_TB1
        weight_grad_C = (grad_TBC * unit_TBC.to(x_TBC.dtype)).flatten(0, -2).sum(0)
        unit_grad_TBC = (grad_TBC * weight_C).float()
        # The gradient's component along x changes only the length of x, which the norm removes.
        along_TB1 = (unit_grad_TBC * unit_TBC).mean(-1, keepdim=True)
        x_grad_TBC = unit_grad_TBC.addcmul_(unit_TBC, along_TB1, value=-1).mul_(scale_TB1)
        return x_grad_TBC.to(x_TBC.dtype), weight_grad_C, None


def block_spec(
    config: TransformerConfig, layers: Layers, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Returns the spec of this pipeline stage's layers; `vp_stage` as for `gpt.PathGPT`."""
    layer = _engine_layer(config) if layers.kind == "transformer_engine" else _local_layer(config)
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = partial(PathAttention, kernel=layers.attention)
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, vp_stage), layer_norm=RMSNorm
    )


def _local_layer(config: TransformerConfig) -> ModuleSpec:
    """Megatron's own modules, which need only torch, and this module's RMSNorm."""
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    if config.num_moe_experts:
        # A router is not fused with its norm; Transformer Engine's layers keep this name in checkpoints too.
        del layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    attention = layer.submodules.self_attention.submodules
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return layer


def _engine_layer(config: TransformerConfig) -> ModuleSpec:
    """Transformer Engine's linear layers and norms; experts are not grouped, as in the local layers."""
    return get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts, moe_grouped_gemm=False, qk_layernorm=config.qk_layernorm
    )


def _gather_row(part_QGD: Tensor) -> Tensor:
    """Gathers the keys or values of the whole row from the context-parallel ranks, in the row's order.

    Backward sums the gradients of all ranks and scatters the parts.
    """
    group = parallel_state.get_context_parallel_group()
    if group.size() == 1:
        return part_QGD
    return restore_order(gather_from_sequence_parallel_region(part_QGD, group=group), group.size())


@contextmanager
def _stored_as_parts(whole: Sequence[Tensor], parts: Sequence[Tensor]) -> Iterator[None]:
    """Of gathered tensors, autograd stores this rank's part; backward gathers the whole again."""
    rows = {
        gathered.untyped_storage().data_ptr(): _GatheredAgain(part.detach())
        for gathered, part in zip(whole, parts, strict=True)
    }

    def pack(tensor: Tensor) -> Tensor | tuple[_GatheredAgain, tuple[Any, ...]]:
        row = rows.get(tensor.untyped_storage().data_ptr())
        view = tensor.size(), tensor.stride(), tensor.storage_offset()
        return tensor if row is None else (row, view)

    def unpack(stored: Tensor | tuple[_GatheredAgain, tuple[Any, ...]]) -> Tensor:
        return stored if isinstance(stored, Tensor) else stored[0].row().as_strided(*stored[1])

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


@dataclass(slots=True, eq=False)
class _GatheredAgain:
    """Keys or values of a row, of which this rank's part is stored."""

    part_QGD: Tensor
    gathered_LGD: Tensor | None = None

    @torch.no_grad()
    def row(self) -> Tensor:
        if self.gathered_LGD is None:
            self.gathered_LGD = _gather_row(self.part_QGD)
        return self.gathered_LGD


def restore_order(gathered_LGD: Tensor, size: int) -> Tensor:
    """Restores the row's order from the concatenated parts of `size` ranks (packing.context_indices).

    Uses chunks, not indices: those would come from the host, and every layer would wait for the device.
    """
    chunks = gathered_LGD.chunk(2 * size)
    return torch.cat([*chunks[::2], *chunks[::-2]])


class PathAttention(MegatronModule):
    """Takes the arguments of Megatron's CoreAttentionBuilder protocol, and `kernel` (dispatch.py)."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        kernel: Kernel = "auto",
    ) -> None:
        super().__init__(config)
        self.scale = softmax_scale or config.kv_channels**-0.5
        self.kernel = kernel

    def forward(
        self,
        query_QBHD: Tensor,
        key_LBGD: Tensor,
        value_LBGD: Tensor,
        layout_KQ: Tensor,
        /,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Returns [Q, B, H * D]; Megatron's `attn_mask_type` is ignored."""
        parts = key_LBGD[:, 0], value_LBGD[:, 0]
        key_LGD, value_LGD = whole = tuple(map(_gather_row, parts))
        again = self.config.gather_again and parallel_state.get_context_parallel_world_size() > 1
        with _stored_as_parts(whole, parts) if again else nullcontext():
            out_QHD = path_attention(query_QBHD[:, 0], key_LGD, value_LGD, layout_KQ, self.scale, self.kernel)
        return out_QHD.flatten(1).unsqueeze(1)
