"""Folders of tiny random models that real servers load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.checkpoint_formats.hf_folder import save_hf_folder
from megatron_parallel_r1.conversion.release import ReleaseInputs, write_release
from megatron_parallel_r1.conversion.shard_plan import Target
from megatron_parallel_r1.conversion.to_megatron import hf_to_megatron
from megatron_parallel_r1.rollout.settings import Thinking
from tests.serve.release import tokenizer
from tests.unit.rollout.tiny import EAGER, VOCABULARY, tiny_qwen3

THINKING = Thinking(
    mode="replay", paths=3, max_blocks=2, max_path_tokens=12, max_response_tokens=90, reserve_tokens=5
)


def untied_model(seed: int = 0) -> Qwen3ForCausalLM:
    """Its logits hang on what it attends to, with tags as likely as before beside the rest."""
    model = tiny_qwen3(seed)
    with torch.no_grad():
        model.lm_head.weight[:, 1:] *= 4
        model.lm_head.weight[:, 0] *= 1.5
    return model


def tied_model(seed: int = 0, eager: Mapping[int, float] = EAGER) -> Qwen3ForCausalLM:
    """It opens blocks often; vLLM's attention on a CPU asks for heads of 32."""
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
        tie_word_embeddings=True,
        max_position_embeddings=4096,
    )
    model = Qwen3ForCausalLM(config).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * (0.15 if weight.dim() > 1 else 0.1))
        # A feature that every hidden state has carries the tags' bias, through tied weights as well.
        model.model.embed_tokens.weight[:, 0] = 8.0
        feature = model.model(torch.arange(VOCABULARY)[None]).last_hidden_state[0, :, 0].mean()
        for token, nats in eager.items():
            model.lm_head.weight[token, 0] = 8.0 + nats / feature
    return model


def write_folder(folder: Path, model: Qwen3ForCausalLM) -> Path:
    """The model and the tokenizer with the six tags."""
    # The names of Hugging Face have one copy of tied weights.
    tied = model.config.tie_word_embeddings
    weights = {
        name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")
    }
    save_hf_folder(folder, ModelConfig.from_hf(model.config.to_dict()), weights.items(), tokenizer())
    return folder


def write_released(folder: Path, model: Qwen3ForCausalLM) -> Path:
    """A release of it, which went through Megatron's form, in several files; `THINKING` is its decoding."""
    hf_to_megatron(write_folder(folder / "hf", model), folder / "megatron", Target(2, 2))
    thinking = folder / "thinking.json"
    thinking.write_text(json.dumps(THINKING.model_dump() | {"prompt_template": "w9 {problem}"}))
    write_release(ReleaseInputs(folder / "megatron", thinking=thinking), folder / "out", shard_bytes=30_000)
    assert len(list((folder / "out").glob("*.safetensors"))) > 1
    return folder / "out"
