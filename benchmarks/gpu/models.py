"""Models: equality with transformers, of rollout and training, and the cost of a step and of a token.

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
from benchmarks.gpu.clock import Cost, cost_of, free_memory
from benchmarks.gpu.rows import TAGS, dense_mask, trace_row
from benchmarks.gpu.sizes import Sizes
from benchmarks.page import Table
from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.architecture.weight_table import weight_table
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.model.gpt import Model, build_model, logits
from megatron_parallel_r1.model.layers import Layers, Scaling
from megatron_parallel_r1.model.weights import hf_tensors, load_hf_tensors, random_hf_tensors
from megatron_parallel_r1.rollout.engine import Sampling
from megatron_parallel_r1.rollout.native.engine import NativeEngine
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.rollout.thinking import Thinker, roll_out
from megatron_parallel_r1.sft.loop import sft_step
from megatron_parallel_r1.thought.layout import Row, lay_out
from megatron_parallel_r1.thought.packing import concatenate, pack
from megatron_parallel_r1.train.micro_batch import MicroBatch
from megatron_parallel_r1.train.trainer import Adam, Trainer

SEED = 1
# The exactness bound of the design, float32.
EQUAL = 2e-5
SCALINGS: tuple[Scaling, ...] = ("none", "delayed", "current", "blockwise")


def _model(shape: ModelConfig, dtype: torch.dtype, layers: Layers, std: float) -> Model:
    model = build_model(shape, dtype, layers=layers)
    load_hf_tensors(model, random_hf_tensors(shape, SEED, std))
    return model


def _weights(shape: ModelConfig, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Random weights of a large model, generated on the device: a host takes minutes."""
    generator = torch.Generator(device).manual_seed(SEED)
    for name, size in (part for entry in weight_table(shape) for part in entry.parts):
        weight = torch.ones(size, device=device)
        if len(size) > 1:
            weight = torch.randn(size, generator=generator, device=device) * 0.02
        yield name, weight.bfloat16()


@torch.no_grad()
def against_transformers(sizes: Sizes, device: torch.device) -> Table:
    """Logits of a row with blocks: Megatron with each kernel and layer kind, and transformers."""
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

    def row(name: list[str], logits_1LV: Tensor, limit: float | None = None) -> list[str]:
        gap_1LV = (logits_1LV.float() - exact_1LV).abs()
        largest = gap_1LV.max().item()
        right = "-" if limit is None else "yes" if largest <= limit else "NO"
        return [*name, f"{largest:.1e}", f"{gap_1LV.mean().item():.1e}", right]

    rows = []
    for kernel in kernels_on(device):
        model = _model(shape, torch.float32, Layers(attention=kernel), 0.1)
        logits_1LV = logits(model, tokens_1L, positions_1L, layout_KL)
        rows.append(row(["local", kernel, "none", "float32"], logits_1LV, EQUAL))
    # The effect of rounding alone, then ours.
    rows.append(row(["transformers'", "eager", "none", "bfloat16"], transformers(torch.bfloat16)))
    for layers in (Layers(), *(Layers("transformer_engine", fp8=scaling) for scaling in SCALINGS)):
        name = [layers.kind, layers.attention, layers.fp8, "bfloat16"]
        try:
            model = _model(shape, torch.bfloat16, layers, 0.1)
            rows.append(row(name, logits(model, tokens_1L, positions_1L, layout_KL)))
        except Exception as error:  # measure the others whatever fails
            rows.append([*name, "-", "-", _line(error)])
    columns = ("layers", "attention", "fp8", "numbers", "max", "mean", f"at most {EQUAL:g}")
    return Table("Difference of logits from transformers' in float32", columns, rows)


def _line(error: Exception) -> str:
    """An error as a table cell."""
    words = " ".join(str(error).split()).replace("|", "/")
    return words if isinstance(error, UserError) else f"{type(error).__name__}: {words[:200]}"


def rollout_against_trainer(sizes: Sizes, device: torch.device) -> Table:
    """Log-probs of sampled tokens: native engine at rollout against trainer."""
    rows = []
    thinking = Thinking(paths=3, max_path_tokens=12, max_response_tokens=110)
    prompts = [[7 + index % 50, 8, 9] for index in range(max(8, sizes.contexts // 8))]
    for dtype in (torch.float32, torch.bfloat16):
        trainer = Trainer(_model(sizes.small, dtype, Layers(), 0.1), Adam(lr=0.0))
        engine = NativeEngine(sizes.small)
        engine.load_weights(hf_tensors(trainer.model), version=0)
        thinker = Thinker(engine, TAGS, thinking)
        traces = asyncio.run(roll_out(thinker, prompts, list(range(len(prompts))), 256, None))
        laid = [lay_out(t.prompt, t.tokens, t.sampled, t.tree, thinking.mode) for t in traces]
        values, suppressed = {"engine": [t.logprobs for t in traces]}, [t.suppressed for t in traces]
        batches = [MicroBatch.of(row, device, values, suppressed, TAGS.parallel) for row in pack(laid, 512)]
        ours_N = torch.cat(trainer.logprobs(batches))
        gap_N = (ours_N - torch.cat([batch.values["engine"] for batch in batches])).abs()
        name = str(dtype).removeprefix("torch.")
        largest = gap_N.max().item()
        right = "-" if dtype != torch.float32 else "yes" if largest <= EQUAL else "NO"
        rows.append([name, str(len(gap_N)), f"{largest:.1e}", f"{gap_N.mean().item():.1e}", right])
    columns = ("numbers", "tokens", "max", "mean", f"at most {EQUAL:g}")
    return Table("Difference of a token's log-prob at rollout and in training", columns, rows)


def steps(sizes: Sizes, device: torch.device) -> Table:
    """An optimizer step on one row with blocks: each kernel, then Transformer Engine's layers."""
    shape = sizes.shape
    variants = [Layers(attention=kernel) for kernel in kernels_on(device)]
    variants += [Layers("transformer_engine", fp8=scaling) for scaling in SCALINGS]
    variants += [Layers("transformer_engine", fp8=scaling, fp8_params=True) for scaling in SCALINGS[1:]]
    row = trace_row(sizes.row, "isolated", shape.vocab)
    rows: list[list[str]] = []
    first = 0.0
    for layers in variants:
        name = [layers.kind, layers.attention, layers.fp8, "fp8" if layers.fp8_params else "bfloat16"]
        try:
            cost, state_mib = _step_cost(layers, row, sizes, device)
            first = first or cost.ms
            speed = [f"{len(row) / cost.ms * 1e3:.0f}", f"{first / cost.ms:.2f}"]
            rows.append([*name, *speed, f"{state_mib:.0f}", f"{cost.mib:.0f}", ""])
        except Exception as error:  # measure the others whatever fails
            rows.append([*name, "-", "-", "-", "-", _line(error)])
        free_memory(device)
    title = (
        f"A training step of {shape.layers} layers of {shape.hidden}, one row of {len(row)} tokens, bfloat16"
    )
    columns = (
        *("layers", "attention", "fp8", "matrices", "tokens/s", "times the first", "MiB of state"),
        *("MiB of activations", "note"),
    )
    return Table(title, columns, rows)


def _step_cost(layers: Layers, row: Row, sizes: Sizes, device: torch.device) -> tuple[Cost, float]:
    """Cost of a step, and MiB of weights, gradients and optimizer state before it."""
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    model = build_model(sizes.shape, torch.bfloat16, layers=layers)
    load_hf_tensors(model, _weights(sizes.shape, device))
    trainer = Trainer(model, Adam(lr=1e-5, sharded=layers.fp8_params))
    sft_step(trainer, [row], len(row), 1e-5)  # creates Adam's state
    state_mib = (torch.cuda.memory_allocated(device) - before) / 2**20 if device.type == "cuda" else 0.0
    return cost_of(lambda: sft_step(trainer, [row], len(row), 1e-5), device, sizes.repeats), state_mib


async def _decode(engine: NativeEngine, contexts: int, tokens: int, prompt: list[int]) -> float:
    """Seconds to decode `tokens` tokens in each of `contexts` samples of one prompt, after its prefill."""
    trunk = engine.open()
    await engine.write(trunk, prompt)
    opened = [engine.fork(trunk) for _ in range(contexts)]
    no_tokens: frozenset[int] = frozenset()
    start = time.perf_counter()
    await asyncio.gather(
        *(
            engine.sample(context, Sampling(seed=seed), tokens, no_tokens, no_tokens)
            for seed, context in enumerate(opened)
        )
    )
    seconds = time.perf_counter() - start
    for context in (trunk, *opened):
        engine.close(context)
    return seconds


def decoding(sizes: Sizes, device: torch.device) -> Table:
    """Tokens/s of the native engine with many concurrent contexts, with and without CUDA graphs."""
    shape, rows = sizes.shape, []
    for prompt in sizes.prompts:
        rates = []
        for recurring in (True, False):
            engine = NativeEngine(shape, recurring=recurring)
            engine.load_weights(_weights(shape, device), version=0)
            words = [7 + index % 50 for index in range(prompt)]
            # The first run captures the graphs.
            seconds = [
                asyncio.run(_decode(engine, sizes.contexts, sizes.new_tokens, words)) for _ in range(3)
            ]
            rates.append(sizes.contexts * sizes.new_tokens / median(seconds[1:]))
            del engine
            free_memory(device)
        numbers = (shape.layers, prompt, sizes.contexts, sizes.new_tokens)
        rows.append([*map(str, numbers), *(f"{rate:.0f}" for rate in rates), f"{rates[0] / rates[1]:.2f}"])
    columns = ("layers", "prompt", "contexts", "tokens of each", "tokens/s", "without graphs", "ratio")
    return Table("The native engine", columns, rows)
