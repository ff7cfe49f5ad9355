"""Small random Qwen3 models of transformers, the reference."""

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.unit.model.rows import Row


def hf_model(tied: bool, kv_heads: int = 2, seed: int = 0) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=112,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=16,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        max_position_embeddings=4096,
        initializer_range=0.1,
    )
    model = Qwen3ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def hf_logits(model: Qwen3ForCausalLM, tokens_1L: Tensor, row: Row) -> Tensor:
    bias_LL = torch.zeros(row.sees_LL.shape).masked_fill(~row.sees_LL, torch.finfo(torch.float32).min)
    return model(tokens_1L, attention_mask=bias_LL[None, None], position_ids=row.positions_1L).logits
