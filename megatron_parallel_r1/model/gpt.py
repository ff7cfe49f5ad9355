"""Megatron's GPT under a layout: each token rotates by its own position and sees what its layout says.

Shapes: L tokens of a row, V vocabulary, K rows of the layout, R rotary dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_parallel_r1.model.config import ModelConfig, transformer_config
from megatron_parallel_r1.model.process import Parallel
from megatron_parallel_r1.model.rotary import PositionRotary
from megatron_parallel_r1.model.spec import local_spec


class PathGPT(GPTModel):
    """A GPTModel whose `position_ids` [1, L] are obeyed and whose `attention_mask` is the layout [K, L].

    Args:
        shape: the architecture, kept as `self.shape`.
        config: Megatron's configuration of it.
        pre_process, post_process: whether this pipeline stage embeds tokens, and whether it makes logits.
        vp_stage: which of this process's interleaved stages this is, if there are several.
    """

    def __init__(
        self,
        shape: ModelConfig,
        config: TransformerConfig,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(
            config=config,
            transformer_layer_spec=local_spec(config, vp_stage),
            vocab_size=shape.vocab,
            max_sequence_length=shape.max_positions,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=shape.tied,
            # GPTModel's own rotary embedding counts tokens and ignores `position_ids`.
            position_embedding_type="none",
            vp_stage=vp_stage,
        )
        self.shape = shape
        self.rotary = PositionRotary(shape.head_dim, shape.rope_theta)

    def _preprocess(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        decoder_input: Tensor | None = None,
        inference_context: BaseInferenceContext | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Any, ...]:
        """GPTModel's hook; its result's second entry is the rotary angles, needed on every pipeline stage."""
        hidden, _none, *others = super()._preprocess(
            input_ids, position_ids, decoder_input, inference_context, packed_seq_params, padding_mask
        )
        return hidden, self.rotary(position_ids), *others


def build_model(
    shape: ModelConfig,
    dtype: torch.dtype = torch.float32,
    parallel: Parallel | None = None,
) -> PathGPT:
    """This process's part of the model, its weights not yet set (see weights.py).

    Args:
        shape: the architecture.
        dtype: of parameters and activations, float32 or bfloat16.
        parallel: how the model is split, as given to `process.start`.

    Raises:
        UserError: the model cannot be split so.
    """
    return PathGPT(
        shape,
        transformer_config(shape, dtype, parallel),
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )


def logits(model: torch.nn.Module, tokens_1L: Tensor, positions_1L: Tensor, layout_KL: Tensor) -> Tensor:
    """Logits [1, L, V] of one packed row, in the model's dtype.

    Args:
        model: a PathGPT, wrapped or not, that is not split into pipeline stages.
        tokens_1L, positions_1L: int64 or int32 token ids and rotary positions.
        layout_KL: int32, see thought/layout.py.
    """
    return model(tokens_1L, positions_1L, layout_KL, runtime_gather_output=True)
