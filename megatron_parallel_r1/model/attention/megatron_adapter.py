"""Megatron's core attention, where `attention_mask` carries the layout of the one packed row.

Shapes: Q queries of this process, L keys of the row (more than Q under context parallelism), B = 1 row,
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


def _whole_row(part_QGD: Tensor) -> Tensor:
    """Keys or values of the whole row, from each context-parallel rank's part, in the order of the row.

    Backward sums the gradients of all ranks and gives each its part.
    """
    group = parallel_state.get_context_parallel_group()
    if group.size() == 1:
        return part_QGD
    return in_order(gather_from_sequence_parallel_region(part_QGD, group=group), group.size())


def in_order(gathered_LGD: Tensor, size: int) -> Tensor:
    """What `size` ranks hold (packing.context_indices), one after another, in the order of the row.

    By chunks and not by indices, which would come from the host: every layer would wait for the device.
    """
    chunks = gathered_LGD.chunk(2 * size)
    return torch.cat([*chunks[::2], *chunks[::-2]])


class PathAttention(MegatronModule):
    """The arguments are those of Megatron's CoreAttentionBuilder protocol, and `kernel` (choice.py)."""

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
        """Returns [Q, B, H * D]; `attn_mask_type` is Megatron's and says nothing here."""
        key_LGD, value_LGD = _whole_row(key_LBGD[:, 0]), _whole_row(value_LBGD[:, 0])
        out_QHD = path_attention(query_QBHD[:, 0], key_LGD, value_LGD, layout_KQ, self.scale, self.kernel)
        return out_QHD.flatten(1).unsqueeze(1)
