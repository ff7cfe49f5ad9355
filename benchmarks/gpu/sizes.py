"""Sizes of the measurements: for a GPU, and tiny ones to test the code on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_parallel_r1.architecture.model_config import ModelConfig


@dataclass(frozen=True)
class Sizes:
    """Sizes of rows in tokens, of attention heads, and of models.

    Attributes:
        lengths: of the rows whose attention is timed.
        dense: longest row that is also timed with a dense mask.
        heads, groups, dim: query heads, KV heads and head dimension; 32, 8 and 128 are Qwen3-8B's.
        repeats: runs per measurement; the median counts.
        shape, row: model of the timed training step, and tokens of its row.
        small: model that is compared with transformers and with its own rollout.
        contexts, new_tokens: concurrent contexts, and new tokens of each.
        prompts: lengths of their shared prompt, one measurement each.
    """

    lengths: tuple[int, ...]
    dense: int
    heads: int
    groups: int
    dim: int
    repeats: int
    shape: ModelConfig
    row: int
    small: ModelConfig
    contexts: int
    new_tokens: int
    prompts: tuple[int, ...]


SMALL = ModelConfig(hidden=256, layers=4, heads=8, kv_heads=4, head_dim=32, ffn=512, vocab=64, tied=False)
FULL = Sizes(
    lengths=(8192, 16384, 32768),
    dense=16384,
    heads=32,
    groups=8,
    dim=128,
    repeats=20,
    # Eight layers of Qwen3-8B.
    shape=ModelConfig(hidden=4096, layers=8, heads=32, kv_heads=8, head_dim=128, ffn=12288, vocab=151936),
    row=16384,
    small=SMALL,
    contexts=256,
    new_tokens=128,
    prompts=(128, 2048),
)
TINY = Sizes(
    lengths=(512,),
    dense=512,
    heads=2,
    groups=1,
    dim=16,
    repeats=1,
    shape=ModelConfig(hidden=32, layers=1, heads=2, kv_heads=1, head_dim=16, ffn=48, vocab=64),
    row=128,
    small=ModelConfig(hidden=32, layers=2, heads=4, kv_heads=2, head_dim=16, ffn=48, vocab=64, tied=False),
    contexts=2,
    new_tokens=4,
    prompts=(3,),
)
