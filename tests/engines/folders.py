"""Hugging Face folders of tiny random models that a real server can load."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_parallel_r1.model.config import ModelConfig
from megatron_parallel_r1.model.hf import save_hf_folder
from tests.serve.release import tokenizer
from tests.unit.rollout.tiny import EAGER, VOCABULARY


def tiny_model(seed: int = 0, tied: bool = True) -> Qwen3ForCausalLM:
    """A random Qwen3 in float32 that opens blocks often; vLLM's attention on a CPU asks for heads of 32."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rope_theta=1000.0,
        tie_word_embeddings=tied,
        max_position_embeddings=4096,
    )
    model = Qwen3ForCausalLM(config).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * (0.15 if weight.dim() > 1 else 0.1))
        # A feature that every hidden state has carries the tags' bias, through tied weights as well.
        model.model.embed_tokens.weight[:, 0] = 8.0
        bias = 0.0 if not tied else 8.0
        model.lm_head.weight[:, 0] = bias
        feature = model.model(torch.arange(VOCABULARY)[None]).last_hidden_state[0, :, 0].mean()
        for token, nats in EAGER.items():
            model.lm_head.weight[token, 0] = bias + nats / feature
    return model


def write_folder(folder: Path, seed: int = 0, tied: bool = True) -> Path:
    """Writes `tiny_model` and the tokenizer with the six tags as a folder that servers load."""
    model = tiny_model(seed, tied)
    # The names of Hugging Face have one copy of tied weights.
    weights = {
        name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")
    }
    save_hf_folder(folder, ModelConfig.from_hf(model.config.to_dict()), weights.items(), tokenizer())
    return folder
