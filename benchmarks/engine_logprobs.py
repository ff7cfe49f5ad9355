"""Measures the log-probs of drawn tokens: native engine against trainer, and both against float64.

    python -m benchmarks.engine_logprobs CHECKPOINT [TOKENS]

The engine draws TOKENS (800) tokens in float32, in plain chains of 100. The trainer computes their log-probs
in packed rows, `transformers` in float64. The last line is `transformers` in float32 with torch.log_softmax,
whose sum loses digits on a CPU.
"""

from __future__ import annotations

import asyncio
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_parallel_r1.checkpoint_formats.hf_folder import load_hf_folder
from megatron_parallel_r1.data.tokenizers import open_tokenizer
from megatron_parallel_r1.distributed import process
from megatron_parallel_r1.model.gpt import build_model
from megatron_parallel_r1.model.weights import load_hf_tensors
from megatron_parallel_r1.rollout.engine import Sampling
from megatron_parallel_r1.rollout.native.engine import NativeEngine
from megatron_parallel_r1.train.logprob_runner import LogprobRunner, causal_logprobs

PROMPTS = ("What is the capital of France?", "Tom has 3 apples and buys 4 more.", "The sea is", "def main():")
CHAIN = 100


async def draw(engine: NativeEngine, prompt: Sequence[int], seed: int) -> tuple[list[int], list[float]]:
    """Draws a chain after a prompt; returns the whole text and the log-probs of the drawn tokens."""
    context = engine.open()
    await engine.write(context, prompt)
    drawn = await engine.sample(context, Sampling(seed=seed), CHAIN, frozenset(), frozenset())
    engine.close(context)
    return [*prompt, *drawn.tokens], list(drawn.logprobs)


async def draw_all(engine: NativeEngine, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    return await asyncio.gather(*(draw(engine, prompt, seed) for seed, prompt in enumerate(prompts)))


def shown(name: str, apart_N: Tensor) -> str:
    sizes = f"largest {apart_N.abs().max():.1e}, mean {apart_N.abs().mean():.1e}"
    return f"{name:<42} {sizes}, bias {apart_N.mean():+.1e}"


@torch.no_grad()
def main() -> None:
    folder, count = Path(sys.argv[1]), int(sys.argv[2]) if sys.argv[2:] else 800
    shape, tensors = load_hf_folder(folder)
    weights = {name: tensor.float() for name, tensor in tensors}
    tokenizer = open_tokenizer(folder)
    prompts = [tokenizer.encode(PROMPTS[index % len(PROMPTS)]) for index in range(count // CHAIN)]
    engine = NativeEngine(shape)
    engine.load_weights(weights.items(), version=0)
    chains = asyncio.run(draw_all(engine, prompts))
    engine_N = torch.tensor([logprob for _, logprobs in chains for logprob in logprobs], dtype=torch.float64)

    with process.running(seed=1):
        model = build_model(shape)
        load_hf_tensors(model, weights.items())
        rows = causal_logprobs(LogprobRunner(model), [text for text, _ in chains], capacity=4096)
    trainer_N = torch.tensor([logprob for row in rows for logprob in row[-CHAIN:]], dtype=torch.float64)

    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    exact: list[Tensor] = []
    usual: list[Tensor] = []
    for double in (False, True):
        reference = reference.double() if double else reference
        for text, _ in chains:
            logits_LV = reference(torch.tensor([text])).logits[0, -CHAIN - 1 : -1]
            logprobs_L1 = logits_LV.log_softmax(-1).gather(1, torch.tensor(text[-CHAIN:])[:, None])
            (exact if double else usual).append(logprobs_L1[:, 0].double())
    exact_N, usual_N = torch.cat(exact), torch.cat(usual)
    print(f"{len(engine_N)} tokens, log-probs to {exact_N.abs().max():.0f}")
    print(shown("engine - trainer", engine_N - trainer_N))
    print(shown("engine - float64", engine_N - exact_N))
    print(shown("trainer - float64", trainer_N - exact_N))
    print(shown("transformers, torch.log_softmax - float64", usual_N - exact_N))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
