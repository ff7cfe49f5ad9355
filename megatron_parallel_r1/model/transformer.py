"""Megatron's configuration of a model under a parallel layout, and rotary embeddings by position."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.distributed.parallel_config import ParallelConfig
from megatron_parallel_r1.model.layers import Layers


def _leave_unset(weight: torch.Tensor) -> None:
    pass


def transformer_config(
    architecture: ModelConfig,
    dtype: torch.dtype = torch.float32,
    parallel: ParallelConfig | None = None,
    layers: Layers | None = None,
) -> TransformerConfig:
    """Returns Megatron's configuration of a model: no dropout, no other fused kernel than asked for,
    deterministic.

    Arguments as in `gpt.build_model`, already checked.
    """
    layers = layers or Layers()
    parallel = parallel or ParallelConfig()
    full = parallel.recompute == "full"
    experts, unrotated = architecture.experts, architecture.unrotated_layers
    # A matrix stored in FP8 counts in delayed scaling's history from its first value on.
    initialize = torch.nn.init.zeros_ if layers.fp8_params else _leave_unset
    config = TransformerConfig(
        num_layers=architecture.layers,
        hidden_size=architecture.hidden,
        num_attention_heads=architecture.heads,
        num_query_groups=architecture.kv_heads,
        kv_channels=architecture.head_dim,
        ffn_hidden_size=architecture.ffn,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.rms_eps,
        qk_layernorm=architecture.qk_norm,
        add_qkv_bias=architecture.qkv_bias,
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype,
        # Weights come from Hugging Face tensors or a seed, the same under every parallel layout. Without
        # perform_initialization Megatron would not mark which weights are split over a tensor group.
        init_method=initialize,
        output_layer_init_method=initialize,
        embedding_init_method=initialize,
        # A step's gradient is the sum over its tokens divided by their number, whatever the packing.
        calculate_per_token_loss=True,
        variable_seq_lengths=parallel.virtual == 1,
        # Of two interleaved pipeline ranks each is both before and after the other. Sent in one batch,
        # activations and gradients are matched by order and swapped; so are the lengths of variable rows.
        overlap_p2p_comm=parallel.virtual > 1,
        batch_p2p_comm=parallel.virtual == 1,
        moe_token_dispatcher_type="alltoall",  # variable lengths need it even without experts
        deterministic_mode=True,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        num_layers_in_first_pipeline_stage=parallel.first_stage_layers,
        num_layers_in_last_pipeline_stage=parallel.last_stage_layers,
        virtual_pipeline_model_parallel_size=parallel.virtual if parallel.virtual > 1 else None,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_split,
        recompute_granularity=None if parallel.recompute == "none" else parallel.recompute,
        recompute_method="uniform" if full else None,
        recompute_num_layers=1 if full else None,
        # "mlp" is that of dense layers alone; "moe" is router, dispatch and experts.
        recompute_modules=["mlp", "moe"] if parallel.recompute == "selective" else None,
        persist_layer_norm=False,
        bias_activation_fusion=layers.fused_swiglu,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        no_rope_freq=[int(layer in unrotated) for layer in range(architecture.layers)] if unrotated else None,
        gradient_accumulation_fusion=False,
        cross_entropy_loss_fusion=False,
        cuda_graph_scope=[],  # the default warns that it is deprecated
        num_moe_experts=experts.count if experts else None,
        moe_ffn_hidden_size=experts.ffn if experts else None,
        moe_router_topk=experts.per_token if experts else 2,
        # A softmax over the selected experts alone equals that over all, scaled to sum to 1.
        moe_router_pre_softmax=experts is not None and not experts.renormalized,
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=layers.balance_loss,  # experts.py's, not one of Megatron's
        # transformers' logits have the model's dtype; near ties among many experts, bfloat16 cannot tell.
        moe_router_dtype="fp32" if experts else None,
        moe_enable_routing_replay=experts is not None,
        transformer_impl=layers.kind,
        **layers.megatron_fields(),
    )
    # Megatron's attention computes YaRN's factor of cosines and sines from it; the config has no such field.
    if architecture.rope_attention_factor != 1.0 and architecture.rope_scaling is not None:
        config.yarn_rotary_scaling_factor = architecture.rope_scaling.factor
    # Not one of Megatron's: spec.PathAttention reads it.
    config.gather_again = parallel.gather_again
    return config


class PositionRotary(nn.Module):
    """Angles of rotary embeddings (arXiv 2104.09864), bit-equal to transformers' in float32."""

    def __init__(self, architecture: ModelConfig) -> None:
        super().__init__()
        self.architecture = architecture
        self._frequencies_r: Tensor | None = None

    @torch.no_grad()
    def forward(self, positions_1L: Tensor) -> Tensor:
        """Returns the angles [L, 1, 1, R] in float32, the form that Megatron's attention takes.

        The frequencies go to the device once. They are no buffer, which a cast to bfloat16 would round.
        """
        if self._frequencies_r is None or self._frequencies_r.device != positions_1L.device:
            self._frequencies_r = self.architecture.rope_frequencies().to(positions_1L.device)
        angles_Lr = positions_1L[0, :, None].float() * self._frequencies_r
        return torch.cat((angles_Lr, angles_Lr), dim=-1)[:, None, None, :]
