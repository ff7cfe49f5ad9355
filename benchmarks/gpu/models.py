"""Models: equal to transformers, their rollout equal to their training, and what a step and a token cost.

Shapes: L tokens of a row, V vocabulary.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from statistics import median

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.gpu.attention import kernels_on
from benchmarks.gpu.clock import Cost, cost_of, let_go
from benchmarks.gpu.rows import TAGS, dense_mask, trace_row
from benchmarks.gpu.sizes import Sizes
from benchmarks.page import Table
from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.architecture.weight_table import weight_table
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.model.gpt import Model, build_model, logits
from megatron_parallel_r1.model.layers import Layers, Scaling
from megatron_parallel_r1.model.optimizer import Adam
from megatron_parallel_r1.model.weights import hf_tensors, load_hf_tensors, random_hf_tensors
from megatron_parallel_r1.rollout.engine import Sampling
from megatron_parallel_r1.rollout.native.engine import NativeEngine
from megatron_parallel_r1.rollout.native.model import Architecture
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.rollout.thinking import Thinker, roll_out
from megatron_parallel_r1.sft.loop import sft_step
from megatron_parallel_r1.thought.layout import Row, lay_out
from megatron_parallel_r1.thought.packing import concatenate, pack
from megatron_parallel_r1.train.micro_batch import MicroBatch
from megatron_parallel_r1.train.trainer import Trainer

SEED = 1
# The promise of the design, for float32.
EQUAL = 2e-5
SCALINGS: tuple[Scaling, ...] = ("none", "delayed", "current", "blockwise")


def _model(shape: ModelConfig, dtype: torch.dtype, layers: Layers, std: float) -> Model:
    model = build_model(shape, dtype, layers=layers)
    load_hf_tensors(model, random_hf_tensors(shape, SEED, std))
    return model


def _weights(shape: ModelConfig, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Of a large model, made where they are needed: a host takes minutes for as many random numbers."""
    generator = torch.Generator(device).manual_seed(SEED)
    for name, size in (part for weight in weight_table(shape) for part in weight.parts):
        made = torch.ones(size, device=device)
        if len(size) > 1:
            made = torch.randn(size, generator=generator, device=device) * 0.02
        yield name, made.bfloat16()


@torch.no_grad()
def against_transformers(sizes: Sizes, device: torch.device) -> Table:
    """Logits of a row with blocks, by Megatron with each kernel and layer, and by transformers."""
    shape = sizes.small
    config = AutoConfig.for_model(**shape.to_hf())
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(device).eval()
    theirs.load_state_dict(dict(random_hf_tensors(shape, SEED, 0.1)))
    packed = concatenate([trace_row(min(512, sizes.row), "isolated", shape.vocab)], [0])
    tokens_1L, positions_1L = (
        torch.from_numpy(x_L).long().to(device)[None] for x_L in (packed.tokens_L, packed.positions_L)
    )
    layout_KL = torch.from_numpy(packed.layout_KL).to(device)
    bias_LL = torch.zeros(len(packed), len(packed), device=device)
    bias_LL.masked_fill_(~dense_mask(layout_KL), torch.finfo(torch.float32).min)

    def transformers(dtype: torch.dtype) -> Tensor:
        bias_11LL = bias_LL[None, None].to(dtype)
        return theirs.to(dtype)(tokens_1L, attention_mask=bias_11LL, position_ids=positions_1L).logits

    exact_1LV = transformers(torch.float32)

    def row(name: list[str], found_1LV: Tensor, limit: float | None = None) -> list[str]:
        gap_1LV = (found_1LV.float() - exact_1LV).abs()
        most = gap_1LV.max().item()
        right = "-" if limit is None else "yes" if most <= limit else "NO"
        return [*name, f"{most:.1e}", f"{gap_1LV.mean().item():.1e}", right]

    rows = []
    for kernel in kernels_on(device):
        model = _model(shape, torch.float32, Layers(attention=kernel), 0.1)
        found_1LV = logits(model, tokens_1L, positions_1L, layout_KL)
        rows.append(row(["local", kernel, "none", "float32"], found_1LV, EQUAL))
    # What rounding alone does, then ours beside it.
    rows.append(row(["transformers'", "eager", "none", "bfloat16"], transformers(torch.bfloat16)))
    for layers in (Layers(), *(Layers("transformer_engine", fp8=scaling) for scaling in SCALINGS)):
        name = [layers.kind, layers.attention, layers.fp8, "bfloat16"]
        try:
            model = _model(shape, torch.bfloat16, layers, 0.1)
            rows.append(row(name, logits(model, tokens_1L, positions_1L, layout_KL)))
        except Exception as failed:  # whatever it is, the others are still to be measured
            rows.append([*name, "-", "-", _line(failed)])
    columns = ("layers", "attention", "fp8", "numbers", "max", "mean", f"at most {EQUAL:g}")
    return Table("Difference of logits from transformers' in float32", columns, rows)


def _line(failed: Exception) -> str:
    """An error as a cell of a table."""
    words = " ".join(str(failed).split()).replace("|", "/")
    return words if isinstance(failed, UserError) else f"{type(failed).__name__}: {words[:200]}"


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
        most = gap_N.max().item()
        right = "-" if dtype != torch.float32 else "yes" if most <= EQUAL else "NO"
        rows.append([name, str(len(gap_N)), f"{most:.1e}", f"{gap_N.mean().item():.1e}", right])
    columns = ("numbers", "tokens", "max", "mean", f"at most {EQUAL:g}")
    return Table("Difference of a token's log-prob at rollout and in training", columns, rows)


def steps(sizes: Sizes, device: torch.device) -> Table:
    """One optimizer step on one row with blocks: each kernel, then Transformer Engine's layers."""
    shape = sizes.shape
    tried = [Layers(attention=kernel) for kernel in kernels_on(device)]
    tried += [Layers("transformer_engine", fp8=scaling) for scaling in SCALINGS]
    tried += [Layers("transformer_engine", fp8=scaling, fp8_params=True) for scaling in SCALINGS[1:]]
    row = trace_row(sizes.row, "isolated", shape.vocab)
    rows: list[list[str]] = []
    first = 0.0
    for layers in tried:
        name = [layers.kind, layers.attention, layers.fp8, "fp8" if layers.fp8_params else "bfloat16"]
        try:
            cost, held = _step_cost(layers, row, sizes, device)
            first = first or cost.ms
            speed = [f"{len(row) / cost.ms * 1e3:.0f}", f"{first / cost.ms:.2f}"]
            rows.append([*name, *speed, f"{held:.0f}", f"{cost.mib:.0f}", ""])
        except Exception as failed:  # whatever it is, the others are still to be measured
            rows.append([*name, "-", "-", "-", "-", _line(failed)])
        let_go(device)
    title = (
        f"A training step of {shape.layers} layers of {shape.hidden}, one row of {len(row)} tokens, bfloat16"
    )
    columns = (
        *("layers", "attention", "fp8", "matrices", "tokens/s", "times the first", "MiB of state"),
        *("MiB of activations", "note"),
    )
    return Table(title, columns, rows)


def _step_cost(layers: Layers, row: Row, sizes: Sizes, device: torch.device) -> tuple[Cost, float]:
    """Of a step, and MiB that weights, gradients and optimizer hold before it."""
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    model = build_model(sizes.shape, torch.bfloat16, layers=layers)
    load_hf_tensors(model, _weights(sizes.shape, device))
    trainer = Trainer(model, Adam(lr=1e-5, sharded=layers.fp8_params))
    sft_step(trainer, [row], len(row), 1e-5)  # Adam's state is born in its first step.
    held = (torch.cuda.memory_allocated(device) - before) / 2**20 if device.type == "cuda" else 0.0
    return cost_of(lambda: sft_step(trainer, [row], len(row), 1e-5), device, sizes.repeats), held


async def _decode(engine: NativeEngine, contexts: int, tokens: int, prompt: list[int]) -> float:
    """Seconds in which as many samples of one prompt, written once, grow by as many tokens."""
    trunk = engine.open()
    await engine.write(trunk, prompt)
    opened = [engine.fork(trunk) for _ in range(contexts)]
    nothing: frozenset[int] = frozenset()
    start = time.perf_counter()
    await asyncio.gather(
        *(
            engine.sample(context, Sampling(seed=seed), tokens, nothing, nothing)
            for seed, context in enumerate(opened)
        )
    )
    seconds = time.perf_counter() - start
    for context in (trunk, *opened):
        engine.close(context)
    return seconds


def decoding(sizes: Sizes, device: torch.device) -> Table:
    """Tokens that the native engine samples in a second, many contexts at once; by CUDA graphs or not."""
    shape, rows = sizes.shape, []
    for prompt in sizes.prompts:
        rates = []
        for recurring in (True, False):
            engine = NativeEngine(Architecture.of(shape), recurring=recurring)
            engine.load_weights(_weights(shape, device), version=0)
            words = [7 + index % 50 for index in range(prompt)]
            # The first captures what is to be captured.
            seconds = [
                asyncio.run(_decode(engine, sizes.contexts, sizes.new_tokens, words)) for _ in range(3)
            ]
            rates.append(sizes.contexts * sizes.new_tokens / median(seconds[1:]))
            del engine
            let_go(device)
        numbers = (shape.layers, prompt, sizes.contexts, sizes.new_tokens)
        rows.append([*map(str, numbers), *(f"{rate:.0f}" for rate in rates), f"{rates[0] / rates[1]:.2f}"])
    columns = ("layers", "prompt", "contexts", "tokens of each", "tokens/s", "without graphs", "ratio")
    return Table("The native engine", columns, rows)
