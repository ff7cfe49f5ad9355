"""A layer's weights, fused for decoding, and its computation before and after attention.

Shapes: as in model.py; A the queries', keys' and values' features, X a token's key and value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megatron_parallel_r1.architecture.families import FAMILIES
from megatron_parallel_r1.architecture.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class LayerWeights:
    attention_norm_E: torch.Tensor
    qkv_AE: torch.Tensor
    qkv_bias_A: torch.Tensor | None
    query_key_norm_JD: torch.Tensor | None
    output_EA: torch.Tensor
    mlp_norm_E: torch.Tensor
    mlp: DenseMlp | ExpertMlp


def attention_inputs(
    layer: LayerWeights,
    hidden_NE: torch.Tensor,
    cos_N1D: torch.Tensor,
    sin_N1D: torch.Tensor,
    heads: int,
    norm_eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries [N, H, D], and each row's key and value for the cache [N, X]."""
    head_dim = cos_N1D.shape[-1]
    normed_NE = rms_norm(hidden_NE, layer.attention_norm_E, norm_eps)
    qkv_NJD = F.linear(normed_NE, layer.qkv_AE, layer.qkv_bias_A).unflatten(-1, (-1, head_dim))
    kv_heads = (qkv_NJD.shape[1] - heads) // 2
    query_key_NJD, value_NKD = qkv_NJD.split([heads + kv_heads, kv_heads], dim=1)
    if layer.query_key_norm_JD is not None:
        query_key_NJD = rms_norm(query_key_NJD, layer.query_key_norm_JD, norm_eps)
    query_NHD, key_NKD = _rotate(query_key_NJD, cos_N1D, sin_N1D).split([heads, kv_heads], dim=1)
    return query_NHD, torch.cat([key_NKD, value_NKD], dim=1).flatten(1)


def feed_forward(layer: LayerWeights, hidden_NE: torch.Tensor, norm_eps: float) -> torch.Tensor:
    """What a dense MLP half adds to each row; in a tensor-parallel group, this rank's share of it."""
    assert isinstance(layer.mlp, DenseMlp)
    return layer.mlp(rms_norm(hidden_NE, layer.mlp_norm_E, norm_eps))


def mix_experts(
    layer: LayerWeights, hidden_NE: torch.Tensor, norm_eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of a layer of experts, and the experts of each row [N, C]."""
    assert isinstance(layer.mlp, ExpertMlp)
    return layer.mlp(rms_norm(hidden_NE, layer.mlp_norm_E, norm_eps))


def fuse_layer(by_name: dict[str, torch.Tensor], prefix: str, config: ModelConfig) -> LayerWeights:
    """Removes a layer's weights from `by_name` and fuses them: only one layer exists twice at a time."""

    def weight(name: str) -> torch.Tensor:
        return by_name.pop(f"{prefix}{name}.weight")

    def pop(parameter: str, expert: int | None = None) -> list[torch.Tensor]:
        return [by_name.pop(prefix + name.format(expert=expert)) for name in family.hf_names(parameter)]

    def mlp(parameters: str, expert: int | None = None) -> DenseMlp:
        (down_EF,) = pop(f"{parameters}.linear_fc2.weight", expert)
        return DenseMlp(torch.cat(pop(f"{parameters}.linear_fc1.weight", expert)), down_EF)

    family = FAMILIES[config.family]

    norms = []
    if f"{prefix}self_attn.q_norm.weight" in by_name:
        heads = (
            (weight("self_attn.q_norm"), config.heads),
            (weight("self_attn.k_norm"), config.kv_heads),
        )
        norms = [norm_D.expand(count, -1) for norm_D, count in heads]
    has_bias = f"{prefix}self_attn.q_proj.bias" in by_name
    biases = [by_name.pop(f"{prefix}self_attn.{part}_proj.bias") for part in "qkv"] if has_bias else []
    feed_forward: DenseMlp | ExpertMlp
    if config.experts:
        (router_XE,) = pop("mlp.router.weight")
        experts = [mlp("mlp.experts.local_experts.{expert}", index) for index in range(len(router_XE))]
        feed_forward = ExpertMlp(router_XE, experts, config.experts.per_token, config.experts.renormalized)
    else:
        feed_forward = mlp("mlp")
    return LayerWeights(
        attention_norm_E=weight("input_layernorm"),
        qkv_AE=torch.cat([weight(f"self_attn.{part}_proj") for part in "qkv"]),
        qkv_bias_A=torch.cat(biases) if has_bias else None,
        query_key_norm_JD=torch.cat(norms) if norms else None,
        output_EA=weight("self_attn.o_proj"),
        mlp_norm_E=weight("post_attention_layernorm"),
        mlp=feed_forward,
    )


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    normed = F.rms_norm(hidden.float(), hidden.shape[-1:], eps=eps)
    return weight * normed.to(hidden.dtype)


def _rotate(x_NHD: torch.Tensor, cos_N1D: torch.Tensor, sin_N1D: torch.Tensor) -> torch.Tensor:
    low, high = x_NHD.chunk(2, dim=-1)
    return x_NHD * cos_N1D + torch.cat([-high, low], dim=-1) * sin_N1D


@dataclass(frozen=True, slots=True)
class DenseMlp:
    """One MLP for all tokens; each rank of a group has its own features, and the ranks' sum is the result."""

    gate_up_FE: torch.Tensor
    down_EF: torch.Tensor

    def __call__(self, hidden_NE: torch.Tensor) -> torch.Tensor:
        gate_NF, up_NF = F.linear(hidden_NE, self.gate_up_FE).chunk(2, dim=-1)
        return F.linear(F.silu(gate_NF) * up_NF, self.down_EF)


@dataclass(frozen=True, slots=True)
class ExpertMlp:
    """The router's top `per_token` experts of each token, weighted; no token is dropped.

    As in transformers' Qwen3MoeTopKRouter: a float32 softmax over all experts; the chosen ones' weights are
    scaled to sum to 1 if `renormalized`. As in the trainer, logits and weights are float32 too.
    """

    router_XE: torch.Tensor
    experts: list[DenseMlp]
    per_token: int
    renormalized: bool

    def __call__(self, hidden_NE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights_NX = F.linear(hidden_NE.float(), self.router_XE.float()).softmax(-1)
        weights_NC, chosen_NC = weights_NX.topk(self.per_token, -1)
        if self.renormalized:
            weights_NC = weights_NC / weights_NC.sum(-1, keepdim=True)
        out_NE = torch.zeros_like(hidden_NE)
        for expert in chosen_NC.unique().tolist():
            rows_M, places_M = (chosen_NC == expert).nonzero(as_tuple=True)
            output_ME = self.experts[expert](hidden_NE[rows_M])
            weighted_ME = (output_ME * weights_NC[rows_M, places_M, None]).to(out_NE.dtype)
            out_NE.index_add_(0, rows_M, weighted_ME)
        return out_NE, chosen_NC
