"""Small random models of each family, by transformers: the reference."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.1,
}
DEFAULT = {"rope_type": "default", "rope_theta": 1e4}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
VARIANTS: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "qwen3 yarn": {"model_type": "qwen3", "head_dim": 16, "rope_parameters": YARN},
    "qwen3_moe": {"model_type": "qwen3_moe", "head_dim": 16, "norm_topk_prob": True, **EXPERTS},
    "qwen3_moe bare": {"model_type": "qwen3_moe", "head_dim": 16, "norm_topk_prob": False, **EXPERTS},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2 linear": {"model_type": "qwen2", "rope_parameters": LINEAR},
    "llama": {"model_type": "llama", "rope_parameters": LLAMA3},
    "mistral": {"model_type": "mistral", "head_dim": 16, "sliding_window": None},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 3},
    "seed_oss": {"model_type": "seed_oss", "head_dim": 16},
    "smollm3": {
        "model_type": "smollm3",
        "tie_word_embeddings": True,
        "no_rope_layer_interval": 2,
        "pad_token_id": 0,
    },
    "llama tied": {"model_type": "llama", "tie_word_embeddings": True},
}


def family_model(variant: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A float32 model of a variant; its norms and biases are random, too."""
    torch.manual_seed(seed)
    settings = {"tie_word_embeddings": False, "rope_parameters": DEFAULT, **SIZES, **VARIANTS[variant]}
    config = AutoConfig.for_model(**{**settings, **changes})
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter)
        elif ".gate." in name:
            torch.nn.init.normal_(parameter, std=0.5)  # experts that are not all alike
    return model
