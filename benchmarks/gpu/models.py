"""Models: equal to transformers, their rollout equal to their training, and what a step and a token cost.

Shapes: L tokens of a row, V vocabulary.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.gpu.attention import kernels_on
from benchmarks.gpu.clock import cost_of
from benchmarks.gpu.rows import TAGS, dense_mask, trace_row
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.tables import Table
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.model.config import ModelConfig
from megatron_parallel_r1.model.gpt import Model, build_model, logits
from megatron_parallel_r1.model.layers import Layers, Scaling
from megatron_parallel_r1.model.optimizer import Adam
from megatron_parallel_r1.model.weights import hf_tensors, load_hf_tensors, random_hf_tensors
from megatron_parallel_r1.rollout.base import Sampling
from megatron_parallel_r1.rollout.native.engine import NativeEngine
from megatron_parallel_r1.rollout.native.model import Architecture
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.rollout.thinking import Thinker, roll_out
from megatron_parallel_r1.thought.layout import lay_out
from megatron_parallel_r1.thought.packing import concatenate, pack
from megatron_parallel_r1.train.microbatch import MicroBatch
from megatron_parallel_r1.train.sft import sft_step
from megatron_parallel_r1.train.trainer import Trainer

SEED = 1


def _model(shape: ModelConfig, dtype: torch.dtype, layers: Layers, std: float = 0.02) -> Model:
    model = build_model(shape, dtype, layers=layers)
    load_hf_tensors(model, random_hf_tensors(shape, SEED, std))
    return model


@torch.no_grad()
def against_transformers(sizes: Sizes, device: torch.device) -> Table:
    """Logits of a row with blocks, by Megatron with each kernel and by transformers with a dense mask."""
    shape = sizes.small
    config = AutoConfig.for_model(**shape.to_hf())
    theirs = (
        AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(device, torch.float32).eval()
    )
    theirs.load_state_dict(dict(random_hf_tensors(shape, SEED, 0.1)))
    packed = concatenate([trace_row(min(512, sizes.row), "isolated", shape.vocab)], [0])
    tokens_1L, positions_1L = (
        torch.from_numpy(x_L).long().to(device)[None] for x_L in (packed.tokens_L, packed.positions_L)
    )
    layout_KL = torch.from_numpy(packed.layout_KL).to(device)
    bias_LL = torch.zeros(len(packed), len(packed), device=device)
    bias_LL.masked_fill_(~dense_mask(layout_KL), torch.finfo(torch.float32).min)
    expected_1LV = theirs(tokens_1L, attention_mask=bias_LL[None, None], position_ids=positions_1L).logits
    rows = []
    for kernel in kernels_on(device):
        model = _model(shape, torch.float32, Layers(attention=kernel), 0.1)
        ours_1LV = logits(model, tokens_1L, positions_1L, layout_KL)
        rows.append([kernel, f"{(ours_1LV - expected_1LV).abs().max().item():.1e}"])
    return Table("Largest difference of logits from transformers', float32", ("kernel", "max"), rows)


def rollout_against_trainer(sizes: Sizes, device: torch.device) -> Table:
    """Log-probs of sampled tokens, by the native engine at rollout and by the trainer afterwards."""
    rows = []
    thinking = Thinking(paths=3, max_path_tokens=12, max_response_tokens=110)
    prompts = [[7 + index % 50, 8, 9] for index in range(max(8, sizes.contexts // 8))]
    for dtype in (torch.float32, torch.bfloat16):
        trainer = Trainer(_model(sizes.small, dtype, Layers(), 0.1), Adam(lr=0.0))
        engine = NativeEngine(Architecture.of(sizes.small))
        engine.load_weights(hf_tensors(trainer.model), version=0)
        thinker = Thinker(engine, TAGS, thinking)
        traces = asyncio.run(roll_out(thinker, prompts, list(range(len(prompts))), 256, None))
        laid = [lay_out(t.prompt, t.tokens, t.sampled, t.tree, thinking.mode) for t in traces]
        values, barred = {"engine": [t.logprobs for t in traces]}, [t.barred for t in traces]
        batches = [MicroBatch.of(row, device, values, barred, TAGS.parallel) for row in pack(laid, 512)]
        ours_N = torch.cat(trainer.logprobs(batches))
        gap_N = (ours_N - torch.cat([batch.values["engine"] for batch in batches])).abs()
        name = str(dtype).removeprefix("torch.")
        rows.append([name, str(len(gap_N)), f"{gap_N.max().item():.1e}", f"{gap_N.mean().item():.1e}"])
    columns = ("numbers", "tokens", "max", "mean")
    return Table("Difference of a token's log-prob at rollout and in training", columns, rows)


def steps(sizes: Sizes, device: torch.device) -> Table:
    """One optimizer step on one row with blocks: each kernel, then Transformer Engine's layers."""
    tried = [Layers(attention=kernel) for kernel in kernels_on(device)]
    scalings: tuple[Scaling, ...] = ("none", "delayed", "current", "blockwise")
    tried += [Layers("transformer_engine", fp8=scaling) for scaling in scalings]
    row = trace_row(sizes.row, "isolated", sizes.shape.vocab)
    rows = []
    for layers in tried:
        name = [layers.kind, layers.attention, layers.fp8]
        try:
            trainer = Trainer(_model(sizes.shape, torch.bfloat16, layers), Adam(lr=1e-5))
        except UserError as refused:
            rows.append([*name, "-", "-", str(refused)])
            continue
        cost = cost_of(
            lambda trainer=trainer: sft_step(trainer, [row], len(row), 1e-5), device, sizes.repeats
        )
        rows.append([*name, f"{len(row) / cost.ms * 1e3:.0f}", f"{cost.mib:.0f}", ""])
        del trainer
    shape = sizes.shape
    title = (
        f"A training step of {shape.layers} layers of {shape.hidden}, one row of {len(row)} tokens, bfloat16"
    )
    return Table(title, ("layers", "attention", "fp8", "tokens/s", "MiB of activations", "note"), rows)


async def _decode(engine: NativeEngine, contexts: int, tokens: int, prompt: list[int]) -> None:
    opened = [engine.open() for _ in range(contexts)]
    await asyncio.gather(*(engine.write(context, prompt) for context in opened))
    nothing: frozenset[int] = frozenset()
    await asyncio.gather(
        *(
            engine.sample(context, Sampling(seed=seed), tokens, nothing, nothing)
            for seed, context in enumerate(opened)
        )
    )
    for context in opened:
        engine.close(context)


def _weights(shape: ModelConfig, device: torch.device) -> list[tuple[str, Tensor]]:
    return [(name, w.to(device, torch.bfloat16)) for name, w in random_hf_tensors(shape, SEED)]


def decoding(sizes: Sizes, device: torch.device) -> Table:
    """Tokens that the native engine samples in a second, many contexts at once."""
    # A vocabulary's logits are sampled from alike at any depth; two layers keep it short.
    shape = replace(sizes.shape, layers=min(2, sizes.shape.layers))
    engine = NativeEngine(Architecture.of(shape))
    engine.load_weights(_weights(shape, device), version=0)
    seconds = []
    for _ in range(2):  # The first compiles what is to be compiled.
        start = time.perf_counter()
        asyncio.run(_decode(engine, sizes.contexts, sizes.new_tokens, [7, 8, 9]))
        seconds.append(time.perf_counter() - start)
    rate = sizes.contexts * sizes.new_tokens / median(seconds[1:])
    row = [str(shape.layers), str(sizes.contexts), str(sizes.new_tokens), f"{rate:.0f}"]
    return Table("The native engine", ("layers", "contexts", "tokens of each", "tokens/s"), [row])
