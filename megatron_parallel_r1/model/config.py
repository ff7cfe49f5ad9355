"""The shape of a Qwen3 model, from and to Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_parallel_r1.errors import UserError

# Fields of a config.json that change the mathematics, and the only values that this model computes.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "attention_dropout": (0, None),
    "use_sliding_window": (False, None),
    "rope_scaling": (None,),
    "quantization_config": (None,),
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A dense Qwen3 architecture. Sizes are counts; `max_positions` bounds the rotary positions of a row."""

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

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> ModelConfig:
        """Reads a Hugging Face `config.json` (of transformers 4 or 5) of a dense Qwen3.

        Args:
            hf: the parsed config.json, or `Qwen3Config.to_dict()`.

        Raises:
            UserError: the architecture is another one, or a field asks for what this model does not compute.
        """
        if hf.get("model_type") != "qwen3":
            raise UserError(
                f"config.json: model_type is {hf.get('model_type')!r}; only dense 'qwen3' is supported"
            )
        for field, allowed in SUPPORTED.items():
            if hf.get(field) not in allowed:
                raise UserError(f"config.json: {field} = {hf[field]!r} is not supported; use a plain Qwen3")
        rope = hf.get("rope_parameters") or {}
        if rope.get("rope_type", "default") != "default":
            raise UserError(
                f"config.json: rope_parameters.rope_type = {rope['rope_type']!r} is not supported; "
                "use a model without rope scaling"
            )
        if set(hf.get("layer_types") or ()) - {"full_attention"}:
            raise UserError("config.json: layer_types other than full_attention are not supported")
        try:
            return cls(
                hidden=hf["hidden_size"],
                layers=hf["num_hidden_layers"],
                heads=hf["num_attention_heads"],
                kv_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
                head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
                ffn=hf["intermediate_size"],
                vocab=hf["vocab_size"],
                rope_theta=float(rope.get("rope_theta") or hf["rope_theta"]),
                rms_eps=hf["rms_norm_eps"],
                tied=hf.get("tie_word_embeddings", False),
                max_positions=hf["max_position_embeddings"],
            )
        except KeyError as missing:
            raise UserError(f"config.json: {missing} is missing; copy the complete file") from None

    def to_hf(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """The `config.json` of a Qwen3ForCausalLM whose weights are of `dtype`.

        Names that changed between transformers 4 and 5 are written in both forms, since inference engines pin
        the older one.
        """
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
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
            "rope_scaling": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "use_sliding_window": False,
            "torch_dtype": str(dtype).removeprefix("torch."),
        }
