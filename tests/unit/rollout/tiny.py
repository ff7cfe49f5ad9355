"""A random tiny Qwen3, with the likelihood of tags raised so that traces have blocks."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.rollout.native.engine import NativeEngine
from megatron_parallel_r1.rollout.native.tensor_parallel import TensorParallelGroup
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.rollout.thinking import Thinker, roll_out
from megatron_parallel_r1.thought.packing import PackedRow
from megatron_parallel_r1.thought.tags import Tags
from megatron_parallel_r1.thought.trace import Trace
from tests.reference.dense import row_sees
from tests.reference.traces import TAGS

VOCABULARY = 40
# How much likelier than other tokens, in nats: blocks open often, paths and summaries end soon.
EAGER = {TAGS.parallel: 1.6, TAGS.path_end: 1.9, TAGS.summary_end: 1.9, TAGS.eos: 0.6}


def tiny_qwen3(
    seed: int = 0,
    tied: bool = False,
    vocabulary: int = VOCABULARY,
    ffn: int = 48,
    kv_heads: int = 2,
    eager: Mapping[int, float] = EAGER,
) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=ffn,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=16,
        rope_theta=1000.0,
        tie_word_embeddings=tied,
        max_position_embeddings=4096,
    )
    model = Qwen3ForCausalLM(config).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * (0.15 if weight.dim() > 1 else 0.1))
        if not tied:
            # A unit feature that every hidden state has carries the tags' bias.
            model.model.embed_tokens.weight[:, 0] = 8.0
            model.lm_head.weight[:, 0] = 0.0
            for token, nats in eager.items():
                model.lm_head.weight[token, 0] = nats / 4.15
    return model


def eager_of(tags: Tags) -> dict[int, float]:
    """How much likelier the tags of a format are: plans of a few items, blocks that close soon."""
    nats = {
        **{"parallel": 1.8, "plan_begin": 3.4, "item": 2.2, "item_end": 3.2, "plan_end": 1.6},
        **{"path_end": 1.9, "summary_end": 1.9},
    }
    roles = dict(zip(tags.format.roles, tags.ids, strict=True))
    return {roles[role]: nats[role] for role in nats if role in roles} | {tags.eos: 0.6}


def native_engine(
    model: Qwen3ForCausalLM, team: TensorParallelGroup | None = None, **settings: int
) -> NativeEngine:
    engine = NativeEngine(ModelConfig.from_hf(model.config.to_dict()), team, **settings)
    engine.load_weights(model.state_dict().items(), version=0)
    return engine


def random_prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(7, VOCABULARY) for _ in range(rng.randint(1, 6))] for _ in range(count)]


def traces_of(
    engine: NativeEngine,
    thinking: Thinking,
    prompts: list[list[int]],
    seeds: list[int] | None = None,
    paths: list[int] | None = None,
    concurrent: int = 256,
    records_experts: bool = False,
    tags: Tags = TAGS,
) -> list[Trace]:
    thinker = Thinker(engine, tags, thinking, records_experts)
    seeds = list(range(len(prompts))) if seeds is None else seeds
    return asyncio.run(roll_out(thinker, prompts, seeds, concurrent, paths))


@torch.no_grad()
def transformers_logprobs(model: Qwen3ForCausalLM, packed: PackedRow, traces: list[Trace]) -> torch.Tensor:
    """Log-probs [L, V] under a packed row's dense mask and positions, by `transformers`."""
    sees_LL = torch.from_numpy(row_sees(packed))
    mask_LL = torch.zeros(sees_LL.shape).masked_fill(~sees_LL, torch.finfo(torch.float32).min)
    logits = model(
        input_ids=torch.from_numpy(packed.tokens_L).long()[None],
        position_ids=torch.from_numpy(packed.positions_L).long()[None],
        attention_mask=mask_LL[None, None],
    ).logits[0]
    suppressed_L = torch.from_numpy(packed.gather([trace.suppressed for trace in traces])) > 0
    logits[suppressed_L, TAGS.parallel] = -torch.inf
    return logits.log_softmax(-1)
