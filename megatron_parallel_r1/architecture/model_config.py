"""The shape of a model, from and to the `config.json` of a Hugging Face folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_parallel_r1.architecture.families import FAMILIES
from megatron_parallel_r1.architecture.rope import RopeScaling, rope_frequencies, rope_gain
from megatron_parallel_r1.errors import UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts of every layer.

    Attributes:
        count: of a layer.
        per_token: how many a token goes through.
        ffn: the feed-forward size of each.
        renormalized: whether the chosen experts' weights are scaled to sum to 1.
    """

    count: int
    per_token: int
    ffn: int
    renormalized: bool = True


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder's architecture. Sizes are counts; `max_positions` bounds the rotary positions of a row.

    `family` is the `model_type` of a config.json, a key of `families.FAMILIES`; `ffn` says nothing where
    there are experts.
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
    experts: Experts | None = None

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise UserError(
                f"model: {self.heads} attention heads cannot share {self.kv_heads} key/value heads evenly; "
                "choose a kv_heads that divides heads"
            )
        if self.head_dim % 2:
            raise UserError(
                f"model: head_dim {self.head_dim} is odd; rotary positions turn pairs, make it even"
            )

    @property
    def qkv_bias(self) -> bool:
        return FAMILIES[self.family].qkv_bias

    @property
    def qk_norm(self) -> bool:
        return FAMILIES[self.family].qk_norm

    @property
    def rope_gain(self) -> float:
        """By which rotary cosines and sines are multiplied."""
        return rope_gain(self.rope_scaling)

    def rope_frequencies(self) -> torch.Tensor:
        """Rotary angles per position, float32 [head_dim / 2]."""
        return rope_frequencies(self.head_dim, self.rope_theta, self.rope_scaling)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> ModelConfig:
        """Reads a Hugging Face `config.json` (of transformers 4 or 5) of one of the `FAMILIES`.

        Args:
            hf: the parsed config.json, or `PreTrainedConfig.to_dict()`.

        Raises:
            UserError: the architecture is another one, or a field asks for what this model does not compute.
        """
        kind = hf.get("model_type")
        if not isinstance(kind, str) or kind not in FAMILIES:
            raise UserError(
                f"config.json: model_type is {kind!r}; supported are {', '.join(map(repr, FAMILIES))}"
            )
        family = FAMILIES[kind]
        for field, allowed in family.fixed.items():
            if hf.get(field) not in allowed:
                told = hf.get(field)
                raise UserError(f"config.json: {field} = {told!r} is not supported; use a plain {kind}")
        if any(told != "full_attention" for told in hf.get("layer_types") or ()):
            raise UserError("config.json: layer_types other than full_attention are not supported")
        # transformers 5 keeps theta and the stretch in one place, 4 kept the stretch apart.
        ropes = [hf.get(field) or {} for field in ("rope_parameters", "rope_scaling")]
        if not all(isinstance(rope, Mapping) for rope in ropes):
            raise UserError("config.json: rope_parameters or rope_scaling is no object; copy the file again")
        stretches = {RopeScaling.of(rope) for rope in ropes if rope}
        theta = {"rope_theta": ropes[0].get("rope_theta") or hf.get("rope_theta")}
        if len(stretches) > 1:
            raise UserError("config.json: rope_scaling and rope_parameters say different things; delete one")
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
                tied=hf.get("tie_word_embeddings") is True,
                max_positions=_count(hf, "max_position_embeddings"),
                family=kind,
                rope_scaling=stretches.pop() if stretches else None,
                experts=_experts(hf) if family.has_experts else None,
            )
        except KeyError as missing:
            raise UserError(f"config.json: {missing} is missing; copy the complete file") from None

    def to_hf(self, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """The `config.json` of a model whose weights are of `dtype`, None: float32.

        Names that changed between transformers 4 and 5 are written in both forms, since inference engines pin
        the older one.
        """
        stretch = self.rope_scaling.to_hf() if self.rope_scaling else {"rope_type": "default"}
        told = {
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
            "rope_scaling": stretch if self.rope_scaling else None,
            "rope_parameters": stretch | {"rope_theta": self.rope_theta},
            "attention_dropout": 0.0,
            "torch_dtype": str(dtype or "float32").removeprefix("torch."),
        }
        for field, (value, *_) in FAMILIES[self.family].fixed.items():
            if value is not None and field not in told:
                told[field] = value
        if self.experts:
            told |= {
                "num_experts": self.experts.count,
                "num_experts_per_tok": self.experts.per_token,
                "moe_intermediate_size": self.experts.ffn,
                "norm_topk_prob": self.experts.renormalized,
            }
        return told


def _count(hf: Mapping[str, Any], field: str, instead: str | None = None) -> int:
    """A whole number above 0.

    Args:
        instead: a field that holds for one that is missing or 0.
    """
    name = field if hf.get(field) or instead is None else instead
    value = hf[name]
    if type(value) is not int or value < 1:
        raise UserError(f"config.json: {name} = {value!r} is no whole number above 0; copy the file again")
    return value


def _number(hf: Mapping[str, Any], field: str) -> float:
    if hf.get(field) is None:
        raise KeyError(field)
    if type(hf[field]) not in (int, float) or not 0 < hf[field] < math.inf:
        raise UserError(f"config.json: {field} = {hf[field]!r} is no number above 0; copy the file again")
    return float(hf[field])


def _experts(hf: Mapping[str, Any]) -> Experts:
    experts = Experts(
        count=_count(hf, "num_local_experts", "num_experts"),
        per_token=_count(hf, "num_experts_per_tok"),
        ffn=_count(hf, "moe_intermediate_size"),
        renormalized=hf.get("norm_topk_prob") is True,
    )
    if experts.per_token > experts.count:
        raise UserError(
            f"config.json: num_experts_per_tok = {experts.per_token} of {experts.count} experts cannot be; "
            "mend it"
        )
    return experts
