"""A model's sizes, read from and written to the `config.json` of a Hugging Face folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_parallel_r1.architecture.families import FAMILIES, Family
from megatron_parallel_r1.architecture.rope import RopeScaling, rope_attention_factor, rope_frequencies
from megatron_parallel_r1.errors import UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """The mixture of experts of every layer.

    Attributes:
        count: experts of a layer.
        per_token: experts that a token is routed to.
        ffn: feed-forward size of an expert.
        renormalized: whether the weights of the selected experts are scaled to sum to 1.
    """

    count: int
    per_token: int
    ffn: int
    renormalized: bool = True


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder's architecture. Sizes are counts; `max_positions` bounds the rotary positions of a row.

    `family` is the `model_type` of a config.json, a key of `families.FAMILIES`; `ffn` is unused with experts;
    `unrotated_layers` are the indices, from 0, of layers without rotary positions.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    rope_theta: float = 1e6
    rms_eps: float = 1e-6
    tied: bool = True
    max_positions: int = 32768
    family: str = "qwen3"
    rope_scaling: RopeScaling | None = None
    experts: ExpertsConfig | None = None
    unrotated_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise UserError(
                f"model: {self.heads} attention heads cannot share {self.kv_heads} key/value heads evenly; "
                "choose a kv_heads that divides heads"
            )
        if self.head_dim % 2:
            raise UserError(
                f"model: head_dim {self.head_dim} is odd; rotary positions rotate pairs; make it even"
            )

    @property
    def qkv_bias(self) -> bool:
        return FAMILIES[self.family].qkv_bias

    @property
    def qk_norm(self) -> bool:
        return FAMILIES[self.family].qk_norm

    @property
    def rope_attention_factor(self) -> float:
        """Factor of the rotary cosines and sines."""
        return rope_attention_factor(self.rope_scaling)

    def rope_frequencies(self) -> torch.Tensor:
        """Rotary angle per position of each pair of dimensions, float32 [head_dim / 2]."""
        return rope_frequencies(self.head_dim, self.rope_theta, self.rope_scaling)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> ModelConfig:
        """Reads a Hugging Face `config.json` (transformers 4 or 5) of one of the `FAMILIES`.

        Fields other than the sizes of the weights may be missing; transformers' defaults hold.

        Args:
            hf: the parsed config.json, or `PreTrainedConfig.to_dict()`.

        Raises:
            UserError: the architecture or the value of a field is not supported.
        """
        kind = hf.get("model_type")
        if not isinstance(kind, str) or kind not in FAMILIES:
            raise UserError(
                f"config.json: model_type is {kind!r}; supported are {', '.join(map(repr, FAMILIES))}"
            )
        family = FAMILIES[kind]
        hf = {**family.defaults, **hf}
        for field, allowed in family.fixed.items():
            if (value := hf.get(field)) not in allowed:
                raise UserError(f"config.json: {field} = {value!r} is not supported; use a plain {kind}")
        if any(layer_type != "full_attention" for layer_type in hf.get("layer_types") or ()):
            raise UserError("config.json: layer_types other than full_attention are not supported")
        # transformers 5 has theta and the scaling in one field, 4 had the scaling in a field of its own.
        ropes = [hf.get(field) or {} for field in ("rope_parameters", "rope_scaling")]
        if not all(isinstance(rope, Mapping) for rope in ropes):
            raise UserError(
                "config.json: rope_parameters or rope_scaling is not an object; copy the file again"
            )
        scalings = {RopeScaling.from_hf(rope) for rope in ropes if rope}
        theta = {"rope_theta": ropes[0].get("rope_theta") or hf.get("rope_theta")}
        if len(scalings) > 1:
            raise UserError("config.json: rope_scaling and rope_parameters contradict each other; delete one")
        try:
            return cls(
                hidden=_count(hf, "hidden_size"),
                layers=_count(hf, "num_hidden_layers"),
                heads=_count(hf, "num_attention_heads"),
                kv_heads=_count(hf, "num_key_value_heads", "num_attention_heads"),
                head_dim=_count(hf, "head_dim")
                if hf.get("head_dim")
                else _count(hf, "hidden_size") // _count(hf, "num_attention_heads"),
                ffn=_count(hf, "intermediate_size"),
                vocab=_count(hf, "vocab_size"),
                rope_theta=_number(theta, "rope_theta"),
                rms_eps=_number(hf, "rms_norm_eps"),
                tied=_flag(hf, "tie_word_embeddings"),
                max_positions=_count(hf, "max_position_embeddings"),
                family=kind,
                rope_scaling=scalings.pop() if scalings else None,
                experts=_experts(hf, family) if family.has_experts else None,
                unrotated_layers=_unrotated_layers(hf, _count(hf, "num_hidden_layers")),
            )
        except KeyError as missing:
            raise UserError(f"config.json: {missing} is missing; copy the complete file") from None

    def to_hf(self, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """Returns the `config.json` of a model with weights of `dtype`; None: float32.

        Fields whose names differ between transformers 4 and 5 are written under both, because inference
        engines pin the older one.
        """
        scaling = self.rope_scaling.to_hf() if self.rope_scaling else {"rope_type": "default"}
        hf: dict[str, Any] = {
            "architectures": [FAMILIES[self.family].architecture],
            "model_type": self.family,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.ffn,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.rms_eps,
            "tie_word_embeddings": self.tied,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling if self.rope_scaling else None,
            "rope_parameters": scaling | {"rope_theta": self.rope_theta},
            "attention_dropout": 0.0,
            "torch_dtype": str(dtype or "float32").removeprefix("torch."),
        }
        for field, (value, *_) in FAMILIES[self.family].fixed.items():
            if field not in hf and (value is not None or field in FAMILIES[self.family].defaults):
                hf[field] = value
        if "no_rope_layer_interval" in FAMILIES[self.family].defaults:
            hf["no_rope_layers"] = [int(layer not in self.unrotated_layers) for layer in range(self.layers)]
            hf["pad_token_id"] = None  # SmolLM3's own is a token that smaller vocabularies lack
        if self.experts:
            count, ffn = FAMILIES[self.family].expert_fields
            hf |= {
                count: self.experts.count,
                "num_experts_per_tok": self.experts.per_token,
                ffn: self.experts.ffn,
                "norm_topk_prob": self.experts.renormalized,
            }
        return hf


def _count(hf: Mapping[str, Any], field: str, fallback: str | None = None) -> int:
    """Reads a whole number above 0.

    Args:
        fallback: the field to read if `field` is missing or 0.
    """
    name = field if hf.get(field) or fallback is None else fallback
    value = hf[name]
    if type(value) is not int or value < 1:
        raise UserError(f"config.json: {name} = {value!r} is not a whole number above 0; copy the file again")
    return value


def _number(hf: Mapping[str, Any], field: str) -> float:
    if hf.get(field) is None:
        raise KeyError(field)
    if type(hf[field]) not in (int, float) or not 0 < hf[field] < math.inf:
        raise UserError(f"config.json: {field} = {hf[field]!r} is not a number above 0; copy the file again")
    return float(hf[field])


def _flag(hf: Mapping[str, Any], field: str) -> bool:
    if type(hf[field]) is not bool:
        raise UserError(
            f"config.json: {field} = {hf[field]!r} is neither true nor false; copy the file again"
        )
    return hf[field]


def _unrotated_layers(hf: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """Reads `no_rope_layers`, where 0 stands for a layer without, or else `no_rope_layer_interval`."""
    rotates = hf.get("no_rope_layers")
    if rotates is None:
        every = hf.get("no_rope_layer_interval") or layers + 1
        return tuple(range(every - 1, layers, every))
    if not isinstance(rotates, list) or len(rotates) < layers or not set(rotates) <= {0, 1}:
        raise UserError(
            f"config.json: no_rope_layers is no list of {layers} times 0 or 1; copy the file again"
        )
    return tuple(layer for layer in range(layers) if not rotates[layer])


def _experts(hf: Mapping[str, Any], family: Family) -> ExpertsConfig:
    count, ffn = family.expert_fields
    experts = ExpertsConfig(
        # transformers 5 has one name for all families.
        count=_count(hf, "num_local_experts", count),
        per_token=_count(hf, "num_experts_per_tok"),
        ffn=_count(hf, ffn),
        renormalized=_flag(hf, "norm_topk_prob"),
    )
    if experts.per_token > experts.count:
        raise UserError(
            f"config.json: num_experts_per_tok = {experts.per_token} exceeds the {experts.count} experts; "
            "lower it"
        )
    if experts.per_token == 1 and experts.renormalized:
        raise UserError(
            "config.json: norm_topk_prob with num_experts_per_tok = 1 gives every chosen expert the weight 1 "
            "and leaves the router untrained; take a model with norm_topk_prob = false"
        )
    return experts
