"""Supported architectures, each with a table from Hugging Face's tensors to Megatron's parameters.

A template names a Megatron parameter and the Hugging Face tensors that it consists of, with their sizes in
words (`query` and `key` are the dimensions of all heads together). Training, weight sync and conversion read
these tables, in either direction. A new architecture is a new `Family`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, slots=True)
class WeightTemplate:
    """One Megatron parameter of each layer (`{layer}`), or of each expert of each layer (`{expert}`).

    Attributes:
        megatron: its name in a whole GPTModel.
        hf: name and sizes of the Hugging Face tensors that it consists of.
        groups: number of row groups that each tensor is cut into; the tensors' groups are interleaved.
        split_dim: the dimension that tensor parallelism splits; None: replicated.
        vocabulary: whether its rows are tokens, zero-padded to a multiple of the tensor-parallel size.
    """

    megatron: str
    hf: tuple[tuple[str, str], ...]
    groups: str | None = None
    split_dim: int | None = None
    vocabulary: bool = False


@dataclass(frozen=True, slots=True)
class Family:
    """An architecture.

    Attributes:
        architecture: the class in transformers.
        layer: the parameters of a layer.
        fixed: fields of config.json that change the computation, with the values that are supported; the
            first is written.
        defaults: transformers' values of the fields that a config.json may lack.
        expert_fields: the fields with the number of experts and with their feed-forward size.
    """

    architecture: str
    layer: tuple[WeightTemplate, ...]
    fixed: Mapping[str, tuple[Any, ...]]
    defaults: Mapping[str, Any]
    expert_fields: tuple[str, str] = ("num_experts", "moe_intermediate_size")

    @property
    def qkv_bias(self) -> bool:
        return QKV_BIAS in self.layer

    @property
    def qk_norm(self) -> bool:
        return QUERY_NORM in self.layer

    @property
    def has_experts(self) -> bool:
        return any(template.megatron == ROUTER.megatron for template in self.layer)

    def hf_names(self, megatron: str) -> tuple[str, ...]:
        """Names of the Hugging Face tensors of a layer's parameter, both without the prefix of the layer."""
        (names,) = (each.hf for each in self.layer if each.megatron == MEGATRON + megatron)
        return tuple(name.removeprefix(HF) for name, _ in names)


def _single(megatron: str, hf: str, sizes: str, split_dim: int | None = None) -> WeightTemplate:
    return WeightTemplate(megatron, ((hf, sizes),), split_dim=split_dim)


def _vocabulary(megatron: str, hf: str) -> WeightTemplate:
    return WeightTemplate(megatron, ((hf, "vocab hidden"),), split_dim=0, vocabulary=True)


MEGATRON, HF = "decoder.layers.{layer}.", "model.layers.{layer}."
_ATTENTION, _HF_ATTENTION = MEGATRON + "self_attention.", HF + "self_attn."
_EXPERT, _HF_EXPERT = MEGATRON + "mlp.experts.local_experts.{expert}.", HF + "mlp.experts.{expert}."

EMBEDDING = _vocabulary("embedding.word_embeddings.weight", "model.embed_tokens.weight")
FINAL_NORM = _single("decoder.final_layernorm.weight", "model.norm.weight", "hidden")
HEAD = _vocabulary("output_layer.weight", "lm_head.weight")

INPUT_NORM = _single(MEGATRON + "input_layernorm.weight", HF + "input_layernorm.weight", "hidden")
QKV = WeightTemplate(
    _ATTENTION + "linear_qkv.weight",
    (
        (_HF_ATTENTION + "q_proj.weight", "query hidden"),
        (_HF_ATTENTION + "k_proj.weight", "key hidden"),
        (_HF_ATTENTION + "v_proj.weight", "key hidden"),
    ),
    groups="kv_heads",
    split_dim=0,
)
QKV_BIAS = WeightTemplate(
    _ATTENTION + "linear_qkv.bias",
    (
        (_HF_ATTENTION + "q_proj.bias", "query"),
        (_HF_ATTENTION + "k_proj.bias", "key"),
        (_HF_ATTENTION + "v_proj.bias", "key"),
    ),
    groups="kv_heads",
    split_dim=0,
)
QUERY_NORM = _single(_ATTENTION + "q_layernorm.weight", _HF_ATTENTION + "q_norm.weight", "head_dim")
KEY_NORM = _single(_ATTENTION + "k_layernorm.weight", _HF_ATTENTION + "k_norm.weight", "head_dim")
OUTPUT = _single(
    _ATTENTION + "linear_proj.weight", _HF_ATTENTION + "o_proj.weight", "hidden query", split_dim=1
)
MLP_NORM = _single(MEGATRON + "pre_mlp_layernorm.weight", HF + "post_attention_layernorm.weight", "hidden")
GATE_UP = WeightTemplate(
    MEGATRON + "mlp.linear_fc1.weight",
    ((HF + "mlp.gate_proj.weight", "ffn hidden"), (HF + "mlp.up_proj.weight", "ffn hidden")),
    split_dim=0,
)
DOWN = _single(MEGATRON + "mlp.linear_fc2.weight", HF + "mlp.down_proj.weight", "hidden ffn", split_dim=1)
ROUTER = _single(MEGATRON + "mlp.router.weight", HF + "mlp.gate.weight", "experts hidden")
EXPERT_GATE_UP = WeightTemplate(
    _EXPERT + "linear_fc1.weight",
    (
        (_HF_EXPERT + "gate_proj.weight", "expert_ffn hidden"),
        (_HF_EXPERT + "up_proj.weight", "expert_ffn hidden"),
    ),
    split_dim=0,
)
EXPERT_DOWN = _single(
    _EXPERT + "linear_fc2.weight", _HF_EXPERT + "down_proj.weight", "hidden expert_ffn", split_dim=1
)
_MIXTRAL = HF + "block_sparse_moe."
MIXTRAL_ROUTER = _single(ROUTER.megatron, _MIXTRAL + "gate.weight", "experts hidden")
MIXTRAL_GATE_UP = WeightTemplate(
    EXPERT_GATE_UP.megatron,
    (
        (_MIXTRAL + "experts.{expert}.w1.weight", "expert_ffn hidden"),
        (_MIXTRAL + "experts.{expert}.w3.weight", "expert_ffn hidden"),
    ),
    split_dim=0,
)
MIXTRAL_DOWN = _single(
    EXPERT_DOWN.megatron, _MIXTRAL + "experts.{expert}.w2.weight", "hidden expert_ffn", split_dim=1
)

_COMMON_FIXED = {"hidden_act": ("silu",), "attention_dropout": (0, None), "quantization_config": (None,)}
_QWEN_FIXED = _COMMON_FIXED | {"use_sliding_window": (False, None)}
_DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "tie_word_embeddings": False,
}

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "qwen3": Family(
            "Qwen3ForCausalLM",
            (INPUT_NORM, QKV, QUERY_NORM, KEY_NORM, OUTPUT, MLP_NORM, GATE_UP, DOWN),
            _QWEN_FIXED | {"attention_bias": (False, None)},
            _DEFAULTS | {"head_dim": 128},
        ),
        "qwen3_moe": Family(
            "Qwen3MoeForCausalLM",
            (INPUT_NORM, QKV, QUERY_NORM, KEY_NORM, OUTPUT, MLP_NORM, ROUTER, EXPERT_GATE_UP, EXPERT_DOWN),
            _QWEN_FIXED
            | {
                "attention_bias": (False, None),
                "decoder_sparse_step": (1, None),
                "mlp_only_layers": ([], None),
            },
            _DEFAULTS
            | {
                "num_key_value_heads": 4,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "moe_intermediate_size": 768,
                "norm_topk_prob": False,
            },
        ),
        "qwen2": Family(
            "Qwen2ForCausalLM",
            (INPUT_NORM, QKV, QKV_BIAS, OUTPUT, MLP_NORM, GATE_UP, DOWN),
            _QWEN_FIXED,
            _DEFAULTS,
        ),
        "llama": Family(
            "LlamaForCausalLM",
            (INPUT_NORM, QKV, OUTPUT, MLP_NORM, GATE_UP, DOWN),
            _COMMON_FIXED
            | {"attention_bias": (False, None), "mlp_bias": (False, None), "pretraining_tp": (1, None)},
            # None: as many as attention heads.
            _DEFAULTS | {"max_position_embeddings": 2048, "num_key_value_heads": None},
        ),
        # Without a window: the first 7B had one.
        "mistral": Family(
            "MistralForCausalLM",
            (INPUT_NORM, QKV, OUTPUT, MLP_NORM, GATE_UP, DOWN),
            _COMMON_FIXED | {"sliding_window": (None,)},
            _DEFAULTS | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        ),
        "mixtral": Family(
            "MixtralForCausalLM",
            (INPUT_NORM, QKV, OUTPUT, MLP_NORM, MIXTRAL_ROUTER, MIXTRAL_GATE_UP, MIXTRAL_DOWN),
            _COMMON_FIXED | {"sliding_window": (None,), "router_jitter_noise": (0.0, None)},
            _DEFAULTS
            | {
                "max_position_embeddings": 131072,
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-5,
                "rope_theta": 1e6,
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
                "norm_topk_prob": True,
            },
            ("num_local_experts", "intermediate_size"),
        ),
        # Each fourth layer has no rotary positions (`no_rope_layers`).
        "smollm3": Family(
            "SmolLM3ForCausalLM",
            (INPUT_NORM, QKV, OUTPUT, MLP_NORM, GATE_UP, DOWN),
            _QWEN_FIXED
            | {"attention_bias": (False, None), "mlp_bias": (False, None), "pretraining_tp": (1, 2, None)},
            _DEFAULTS
            | {
                "num_key_value_heads": 4,
                "rope_theta": 2e6,
                "tie_word_embeddings": True,
                "no_rope_layer_interval": 4,
            },
        ),
        # Its config names the dropout of its pretraining; nothing here drops anything.
        "seed_oss": Family(
            "SeedOssForCausalLM",
            (INPUT_NORM, QKV, QKV_BIAS, OUTPUT, MLP_NORM, GATE_UP, DOWN),
            _COMMON_FIXED
            | {
                "attention_bias": (True,),
                "attention_out_bias": (False, None),
                "mlp_bias": (False, None),
                "attention_dropout": (0.0, None, 0.1),
                "residual_dropout": (0.0, None, 0.1),
                "pretraining_tp": (1, None),
            },
            _DEFAULTS
            | {
                "max_position_embeddings": 524288,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "attention_bias": True,
            },
        ),
    }
)
"""By `model_type` of a config.json."""
