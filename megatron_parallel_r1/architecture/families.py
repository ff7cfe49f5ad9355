"""The architectures: of each, one table between Megatron's parameters and Hugging Face's tensors.

A row names a Megatron parameter and the Hugging Face tensors that it is made of, with their sizes in words
(`query` and `key` are all heads' dimensions together). Everything that moves weights reads these tables, in
either direction: training, weight sync, conversion. A new architecture is a new `Family`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """One Megatron parameter of each layer (`{layer}`), or of each expert of each layer (`{expert}`).

    Attributes:
        ours: its name in a whole, unsplit GPTModel.
        theirs: name and sizes of the Hugging Face tensors that it is made of.
        groups: into how many groups of rows each of them is cut, before those are dealt out in turn.
        cut: the dimension along which tensor parallelism splits it; None: every rank has all of it.
        vocabulary: whether its rows are tokens, filled up with zeros where the ranks do not divide them.
    """

    ours: str
    theirs: tuple[tuple[str, str], ...]
    groups: str | None = None
    cut: int | None = None
    vocabulary: bool = False


@dataclass(frozen=True, slots=True)
class Family:
    """An architecture.

    Attributes:
        architecture: the class in transformers.
        layer: the rows of a layer.
        fixed: fields of a config.json that change the mathematics, and the only values that are computed.
    """

    architecture: str
    layer: tuple[Row, ...]
    fixed: Mapping[str, tuple[Any, ...]]

    @property
    def qkv_bias(self) -> bool:
        return QKV_BIAS in self.layer

    @property
    def qk_norm(self) -> bool:
        return QUERY_NORM in self.layer

    @property
    def has_experts(self) -> bool:
        return ROUTER in self.layer


def _plain(ours: str, theirs: str, sizes: str, cut: int | None = None) -> Row:
    return Row(ours, ((theirs, sizes),), cut=cut)


def _of_tokens(ours: str, theirs: str) -> Row:
    return Row(ours, ((theirs, "vocab hidden"),), cut=0, vocabulary=True)


OURS, THEIRS = "decoder.layers.{layer}.", "model.layers.{layer}."
_OWN, _SELF = OURS + "self_attention.", THEIRS + "self_attn."
_EXPERT, _EXPERTS = OURS + "mlp.experts.local_experts.{expert}.", THEIRS + "mlp.experts.{expert}."

EMBEDDING = _of_tokens("embedding.word_embeddings.weight", "model.embed_tokens.weight")
FINAL_NORM = _plain("decoder.final_layernorm.weight", "model.norm.weight", "hidden")
HEAD = _of_tokens("output_layer.weight", "lm_head.weight")

INPUT_NORM = _plain(OURS + "input_layernorm.weight", THEIRS + "input_layernorm.weight", "hidden")
QKV = Row(
    _OWN + "linear_qkv.weight",
    (
        (_SELF + "q_proj.weight", "query hidden"),
        (_SELF + "k_proj.weight", "key hidden"),
        (_SELF + "v_proj.weight", "key hidden"),
    ),
    groups="kv_heads",
    cut=0,
)
QKV_BIAS = Row(
    _OWN + "linear_qkv.bias",
    ((_SELF + "q_proj.bias", "query"), (_SELF + "k_proj.bias", "key"), (_SELF + "v_proj.bias", "key")),
    groups="kv_heads",
    cut=0,
)
QUERY_NORM = _plain(_OWN + "q_layernorm.weight", _SELF + "q_norm.weight", "head_dim")
KEY_NORM = _plain(_OWN + "k_layernorm.weight", _SELF + "k_norm.weight", "head_dim")
OUTPUT = _plain(_OWN + "linear_proj.weight", _SELF + "o_proj.weight", "hidden query", cut=1)
MLP_NORM = _plain(OURS + "pre_mlp_layernorm.weight", THEIRS + "post_attention_layernorm.weight", "hidden")
GATE_UP = Row(
    OURS + "mlp.linear_fc1.weight",
    ((THEIRS + "mlp.gate_proj.weight", "ffn hidden"), (THEIRS + "mlp.up_proj.weight", "ffn hidden")),
    cut=0,
)
DOWN = _plain(OURS + "mlp.linear_fc2.weight", THEIRS + "mlp.down_proj.weight", "hidden ffn", cut=1)
ROUTER = _plain(OURS + "mlp.router.weight", THEIRS + "mlp.gate.weight", "experts hidden")
EXPERT_GATE_UP = Row(
    _EXPERT + "linear_fc1.weight",
    (
        (_EXPERTS + "gate_proj.weight", "expert_ffn hidden"),
        (_EXPERTS + "up_proj.weight", "expert_ffn hidden"),
    ),
    cut=0,
)
EXPERT_DOWN = _plain(_EXPERT + "linear_fc2.weight", _EXPERTS + "down_proj.weight", "hidden expert_ffn", cut=1)

_ALL = {"hidden_act": ("silu",), "attention_dropout": (0, None), "quantization_config": (None,)}
_QWEN = _ALL | {"use_sliding_window": (False, None)}

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "qwen3": Family(
            "Qwen3ForCausalLM",
            (INPUT_NORM, QKV, QUERY_NORM, KEY_NORM, OUTPUT, MLP_NORM, GATE_UP, DOWN),
            _QWEN | {"attention_bias": (False, None)},
        ),
        "qwen3_moe": Family(
            "Qwen3MoeForCausalLM",
            (INPUT_NORM, QKV, QUERY_NORM, KEY_NORM, OUTPUT, MLP_NORM, ROUTER, EXPERT_GATE_UP, EXPERT_DOWN),
            _QWEN
            | {
                "attention_bias": (False, None),
                "decoder_sparse_step": (1, None),
                "mlp_only_layers": ([], None),
            },
        ),
        "qwen2": Family(
            "Qwen2ForCausalLM", (INPUT_NORM, QKV, QKV_BIAS, OUTPUT, MLP_NORM, GATE_UP, DOWN), _QWEN
        ),
        "llama": Family(
            "LlamaForCausalLM",
            (INPUT_NORM, QKV, OUTPUT, MLP_NORM, GATE_UP, DOWN),
            _ALL | {"attention_bias": (False, None), "mlp_bias": (False, None), "pretraining_tp": (1, None)},
        ),
    }
)
"""By `model_type` of a config.json."""
