"""Megatron's GPT under a layout: each token has its own position, and its layout says what it attends to.

Shapes: L tokens of a row, T tokens of it on this rank (fewer under sequence parallelism), E hidden size,
V vocabulary, K rows of the layout, R rotary dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

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
from megatron_parallel_r1.model.experts import take_choices
from megatron_parallel_r1.model.layers import Layers, check_balance, check_fp8, check_layers
from megatron_parallel_r1.model.spec import block_spec
from megatron_parallel_r1.model.transformer import PositionRotary, transformer_config


class PathGPT(GPTModel):
    """A GPTModel stage that uses `position_ids` [1, L] and takes the layout as `attention_mask`.

    The last stage returns hidden states [T, 1, E] like any other. Logits are computed where they are needed
    (train/target_logprobs.py): those of a long row over a large vocabulary would not fit into memory.

    Args:
        pre_process, post_process: whether this stage embeds tokens, and whether it is the last one.
        vp_stage: index of this stage among the rank's interleaved ones, if there are several.
    """

    def __init__(
        self,
        architecture: ModelConfig,
        config: TransformerConfig,
        layers: Layers,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(
            config=config,
            transformer_layer_spec=block_spec(config, layers, vp_stage),
            vocab_size=padded_vocab(architecture.vocab, config.tensor_model_parallel_size),
            max_sequence_length=architecture.max_positions,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=architecture.tied,
            # GPTModel's own rotary embedding ignores `position_ids`.
            position_embedding_type="none",
            vp_stage=vp_stage,
        )
        self.architecture = architecture
        self.rotary = PositionRotary(architecture)

    def _preprocess(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        decoder_input: Tensor | None = None,
        inference_context: BaseInferenceContext | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Any, ...]:
        """Overrides a hook of GPTModel; the second result is the rotary angles, for every pipeline stage, and
        the last the experts of this rank's tokens (experts.py), which come as `padding_mask`."""
        hidden, _none, *others, _no_mask = super()._preprocess(
            input_ids, position_ids, decoder_input, inference_context, packed_seq_params
        )
        if padding_mask is not None and self.config.sequence_parallel:
            size = self.config.tensor_model_parallel_size
            padding_mask = padding_mask.chunk(size)[parallel_state.get_tensor_model_parallel_rank()]
        return hidden, self.rotary(position_ids), *others, padding_mask

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Overrides GPTModel's hook, which would compute the logits of all tokens."""
        return hidden_states

    def whole_hidden(self, hidden_T1E: Tensor) -> Tensor:
        """Returns the last stage's output of all tokens [L, E], to be multiplied with `head_weight`.

        Backward sums over the tensor group, in which each rank has the logits of its part of the vocabulary.
        """
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden_T1E, tensor_parallel_output_grad=True)[:, 0]
        return copy_to_tensor_model_parallel_region(hidden_T1E)[:, 0]

    def head_weight(self) -> Tensor:
        """Returns this rank's rows [V, E] of the output matrix."""
        return (
            self.shared_embedding_or_output_weight() if self.architecture.tied else self.output_layer.weight
        )


class Model(nn.ModuleList):
    """This rank's part of a model: one pipeline stage, or several that are interleaved."""

    def __init__(self, architecture: ModelConfig, stages: list[PathGPT]) -> None:
        super().__init__(stages)
        self.architecture = architecture
        self.config = stages[0].config

    if TYPE_CHECKING:  # ModuleList's own types know Module alone

        def __iter__(self) -> Iterator[PathGPT]: ...
        def __getitem__(self, index: int) -> PathGPT: ...  # type: ignore[override]


def build_model(
    architecture: ModelConfig,
    dtype: torch.dtype = torch.float32,
    parallel: ParallelConfig | None = None,
    layers: Layers | None = None,
) -> Model:
    """Builds this rank's part of the model; the weights are set afterwards (weights.py).

    Args:
        architecture: of the whole model.
        dtype: of parameters and activations, float32 or bfloat16.
        parallel: the same as for `process.start`.
        layers: None: Megatron's own.

    Raises:
        UserError: the model cannot be split this way, or its layers cannot run here.
    """
    parallel, layers = parallel or ParallelConfig(), layers or Layers()
    check_parallel(architecture, parallel, dist.get_world_size())
    check_layers(layers, architecture.head_dim, dtype)
    check_balance(layers, architecture)
    check_fp8(layers, architecture, parallel.tensor, parallel.pipeline)
    # One object: what wrap_for_training() sets on it must hold for every stage.
    config = transformer_config(architecture, dtype, parallel, layers)
    stages: Iterable[int | None] = range(parallel.virtual) if parallel.virtual > 1 else (None,)
    model = Model(
        architecture,
        [
            PathGPT(
                architecture,
                config,
                layers,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
                vp_stage=stage,
            )
            for stage in stages
        ],
    )
    take_choices(model)
    if torch.cuda.is_available():
        _move_to_device(model, torch.device("cuda", torch.cuda.current_device()))
    return model


def _move_to_device(model: Model, device: torch.device) -> None:
    """Moves parameters that Megatron creates on the CPU: the router's weights of a mixture of experts."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.device != device:
                moved = torch.nn.Parameter(parameter.detach().to(device), parameter.requires_grad)
                # Marks such as `sequence_parallel`, by which Megatron reduces its gradient.
                moved.__dict__.update(parameter.__dict__)
                setattr(module, name, moved)


def logits(model: Model, tokens_1L: Tensor, positions_1L: Tensor, layout_KL: Tensor) -> Tensor:
    """Computes the logits [1, L, V] of one packed row, in the model's dtype, on every tensor-parallel rank.

    Args:
        model: without pipeline stages.
        tokens_1L, positions_1L: int64 or int32 token ids and rotary positions.
        layout_KL: int32, see thought/layout.py.
    """
    (stage,) = model
    hidden_LE = stage.whole_hidden(stage(tokens_1L, positions_1L, layout_KL))
    logits_LV = gather_from_tensor_model_parallel_region(hidden_LE @ stage.head_weight().T)
    return logits_LV[None, :, : model.architecture.vocab]
