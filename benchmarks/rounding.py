"""Measures how far two sound computations of the same log-probs are apart, and how far wrong weights are.

    python -m benchmarks.rounding [CHECKPOINT]

The trainer packs its rows and runs Megatron's layers; the server is `transformers`, row by row, with the same
weights: of a folder, or random ones of 2, 8 and 36 layers. Figures are the largest difference / the mean, in
the units of `utils/rounding.py`.
"""

import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.checkpoint_formats.hf_folder import load_hf_folder
from megatron_parallel_r1.distributed import process
from megatron_parallel_r1.model.gpt import build_model
from megatron_parallel_r1.model.weights import load_hf_tensors, random_hf_tensors
from megatron_parallel_r1.train.logprob_runner import LogprobRunner, causal_logprobs, probe_texts
from megatron_parallel_r1.utils.rounding import ROUNDOFF

Weights = dict[str, Tensor]


def random_model(layers: int, size: float) -> tuple[ModelConfig, Weights]:
    """A random model whose logits have about the standard deviation `size`."""
    config = ModelConfig(64, layers, 4, 2, 16, 96, 1000, rope_theta=1e4, tied=False, max_positions=1024)
    weights = dict(random_hf_tensors(config, seed=0, std=0.2))
    return config, weights | {"lm_head.weight": weights["lm_head.weight"] * (size / (0.2 * 64**0.5))}


def damaged(weights: Weights, name: str, relative: float) -> Weights:
    noise = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(9))
    return weights | {name: weights[name] * (1 + relative * noise)}


def trained(config: ModelConfig, weights: Weights, dtype: torch.dtype, temperature: float) -> Tensor:
    model = build_model(config, dtype)
    load_hf_tensors(model, weights.items())
    runner = LogprobRunner(model, temperature)
    return torch.tensor(causal_logprobs(runner, probe_texts(config.vocab), capacity=4096))


@torch.no_grad()
def served(config: ModelConfig, weights: Weights, dtype: torch.dtype, temperature: float) -> Tensor:
    fields = config.to_hf()
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
    model.load_state_dict(weights, strict=not config.tied)
    model.to(dtype).eval()
    rows = torch.tensor(probe_texts(config.vocab))
    logits = [model(row_L[None]).logits[0, :-1].float() / temperature for row_L in rows]
    return torch.stack(logits).log_softmax(-1).gather(2, rows[:, 1:, None])[:, :, 0]


def measure(config: ModelConfig, weights: Weights, dtype: torch.dtype, temperature: float) -> str:
    name, middle = str(dtype).removeprefix("torch."), f"model.layers.{config.layers // 2}"
    expected = trained(config, weights, dtype, temperature)
    scale = expected.abs().max().item()
    text = f"{name}, {config.layers} layers, temperature {temperature}, log-probs to {scale:.0f}:"
    for matrix, relative in (("up_proj", 0.0), ("up_proj", 1e-3), ("q_proj", 1e-3), ("up_proj", 1.0)):
        part = "self_attn" if matrix == "q_proj" else "mlp"
        server = damaged(weights, f"{middle}.{part}.{matrix}.weight", relative)
        apart = (served(config, server, dtype, temperature) - expected).abs()
        apart /= ROUNDOFF[name] * (2 * config.layers + 2) ** 0.5 * scale
        text += f"  {matrix} wrong by {relative:g}: {apart.max():.2g} / {apart.mean():.2g}"
    return text


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    models = [random_model(layers, size) for layers in (2, 8, 36) for size in (1.0, 4.0, 10.0)]
    if sys.argv[1:]:
        shape, tensors = load_hf_folder(Path(sys.argv[1]))
        models = [(shape, dict(tensors))]
    with process.running(seed=1):
        for kind in (torch.float32, torch.bfloat16):
            for model in models:
                print(*(measure(*model, kind, temperature) for temperature in (1.0, 0.5)), sep="\n")
