"""A core attention for Megatron, whose `attention_mask` argument is the layout of the packed row.

Shapes: Q queries of this rank, L keys of the row (more than Q under context parallelism), B = 1 row,
H query heads in G groups that share a key/value head, D head dimension, K rows of the layout.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_parallel_r1.model.attention.dispatch import Kernel, path_attention


def _gather_row(part_QGD: Tensor) -> Tensor:
    """Gathers the keys or values of the whole row from the context-parallel ranks, in the row's order.

    Backward sums the gradients of all ranks and scatters the parts.
    """
    group = parallel_state.get_context_parallel_group()
    if group.size() == 1:
        return part_QGD
    return restore_order(gather_from_sequence_parallel_region(part_QGD, group=group), group.size())


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
        key_LGD, value_LGD = _gather_row(key_LBGD[:, 0]), _gather_row(value_LBGD[:, 0])
        out_QHD = path_attention(query_QBHD[:, 0], key_LGD, value_LGD, layout_KQ, self.scale, self.kernel)
        return out_QHD.flatten(1).unsqueeze(1)
