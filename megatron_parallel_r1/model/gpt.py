"""Megatron's GPT under a layout: each token rotates by its own position and sees what its layout says.

Shapes: L tokens of a row, T tokens of it on this process (fewer under sequence parallelism), E hidden size,
V vocabulary, K rows of the layout, R rotary dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.architecture.weight_table import padded_vocab
from megatron_parallel_r1.distributed.parallel_config import ParallelConfig, check_parallel
from megatron_parallel_r1.model.layers import Layers, check_layers
from megatron_parallel_r1.model.spec import block_spec
from megatron_parallel_r1.model.transformer import PositionRotary, transformer_config

__all__ = ["Model", "PathGPT", "build_model", "logits", "padded_vocab"]


class PathGPT(GPTModel):
    """A stage of GPTModel that obeys `position_ids` [1, L]; its `attention_mask` is the layout.

    The last stage returns hidden states [T, 1, E] like any other. Logits are made from them where they are
    needed (train/target_logprobs.py): those of a long row over a large vocabulary would fill the memory.

    Args:
        shape: the architecture, kept as `self.shape`.
        config: Megatron's configuration of it.
        layers: what its layers are made of.
        pre_process, post_process: whether this stage embeds tokens, and whether logits are made from it.
        vp_stage: which of this process's interleaved stages this is, if there are several.
    """

    def __init__(
        self,
        shape: ModelConfig,
        config: TransformerConfig,
        layers: Layers,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(
            config=config,
            transformer_layer_spec=block_spec(config, layers, vp_stage),
            vocab_size=padded_vocab(shape.vocab, config.tensor_model_parallel_size),
            max_sequence_length=shape.max_positions,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=shape.tied,
            # GPTModel's own rotary embedding counts tokens and ignores `position_ids`.
            position_embedding_type="none",
            vp_stage=vp_stage,
        )
        self.shape = shape
        self.rotary = PositionRotary(shape)

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

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """GPTModel's hook, which would make logits of all tokens."""
        return hidden_states

    def whole_hidden(self, hidden_T1E: Tensor) -> Tensor:
        """The last stage's output of all tokens [L, E], ready for `head_weight`.

        Backward sums over the tensor group, in which each process has logits of its part of the vocabulary.
        """
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden_T1E, tensor_parallel_output_grad=True)[:, 0]
        return copy_to_tensor_model_parallel_region(hidden_T1E)[:, 0]

    def head_weight(self) -> Tensor:
        """This process's rows [V, E] of the matrix that makes logits."""
        return self.shared_embedding_or_output_weight() if self.shape.tied else self.output_layer.weight


class Model(nn.ModuleList):
    """This process's part of a model: one pipeline stage, or several that are interleaved.

    Attributes:
        shape: of the whole model.
        config: Megatron's, one for all stages.
    """

    def __init__(self, shape: ModelConfig, stages: list[PathGPT]) -> None:
        super().__init__(stages)
        self.shape = shape
        self.config = stages[0].config


def build_model(
    shape: ModelConfig,
    dtype: torch.dtype = torch.float32,
    parallel: ParallelConfig | None = None,
    layers: Layers | None = None,
) -> Model:
    """This process's part of the model, its weights not yet set (see weights.py).

    Args:
        shape: the architecture.
        dtype: of parameters and activations, float32 or bfloat16.
        parallel: how the model is split, as given to `process.start`.
        layers: what its layers are made of; None for Megatron's own.

    Raises:
        UserError: the model cannot be split so, or its layers cannot run here.
    """
    parallel, layers = parallel or ParallelConfig(), layers or Layers()
    check_parallel(shape, parallel, dist.get_world_size())
    check_layers(layers, shape.head_dim, dtype)
    # One object: what trainable() sets on it must hold for every stage.
    config = transformer_config(shape, dtype, parallel, layers)
    numbers = range(parallel.virtual) if parallel.virtual > 1 else (None,)
    return Model(
        shape,
        [
            PathGPT(
                shape,
                config,
                layers,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=number),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=number),
                vp_stage=number,
            )
            for number in numbers
        ],
    )


def logits(model: Model, tokens_1L: Tensor, positions_1L: Tensor, layout_KL: Tensor) -> Tensor:
    """Logits [1, L, V] of one packed row, in the model's dtype, on every process of a tensor group.

    Args:
        model: not split into pipeline stages.
        tokens_1L, positions_1L: int64 or int32 token ids and rotary positions.
        layout_KL: int32, see thought/layout.py.
    """
    (stage,) = model
    hidden_LE = stage.whole_hidden(stage(tokens_1L, positions_1L, layout_KL))
    logits_LV = gather_from_tensor_model_parallel_region(hidden_LE @ stage.head_weight().T)
    return logits_LV[None, :, : model.shape.vocab]
