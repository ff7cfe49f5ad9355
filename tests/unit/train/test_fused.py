"""Megatron's fused SwiGLU against the one of three steps: the same but for rounding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.model.gpt import build_model
from megatron_parallel_r1.model.layers import Layers
from megatron_parallel_r1.model.weights import hf_tensors, load_hf_tensors, random_hf_tensors
from megatron_parallel_r1.sft.loop import sft_loss
from megatron_parallel_r1.thought.layout import lay_out
from megatron_parallel_r1.thought.tree import Tree
from megatron_parallel_r1.train.micro_batch import BatchPartition, MicroBatch, partition_rows
from megatron_parallel_r1.train.trainer import Adam, Trainer
from tests.unit.train.test_routing import SHAPE

# Float32 products in another order; in bfloat16 backward rounds the gate's gradient once less, at 2^-8.
RELATIVE = {torch.float32: 1e-6, torch.bfloat16: 2**-8}


def trained(
    shape: ModelConfig, dtype: torch.dtype, fused: bool
) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss and gradient norm of a step, and the weights after it."""
    model = build_model(shape, dtype, layers=Layers(fused_swiglu=fused))
    load_hf_tensors(model, random_hf_tensors(shape, seed=3, std=0.2))
    trainer = Trainer(model, Adam(lr=1e-2, eps=1e-4))
    text = torch.randint(40, (90,), generator=torch.Generator().manual_seed(0)).tolist()
    row = lay_out(text[:2], text[2:], [True] * 88, Tree(88, ()), "causal")
    batches = [
        MicroBatch.of(packed, trainer.device) for packed in partition_rows([row], 100, BatchPartition())
    ]
    update = trainer.update(batches, lambda logprobs_N, *_: (sft_loss(logprobs_N), {}), 1e-2)
    return update.loss, update.grad_norm, {name: weight.float().clone() for name, weight in hf_tensors(model)}


@pytest.mark.parametrize("dtype", list(RELATIVE))
@pytest.mark.parametrize("shape", [SHAPE, replace(SHAPE, experts=None, family="qwen3")])
def test_a_step_differs_in_rounding_alone(shape: ModelConfig, dtype: torch.dtype) -> None:
    plain = trained(shape, dtype, fused=False)
    with torch.compiler.set_stance("force_eager"):
        fused = trained(shape, dtype, fused=True)
    apart = [abs(ours / theirs - 1) for ours, theirs in zip(fused[:2], plain[:2], strict=True)]
    apart.append(max(float((fused[2][n] - plain[2][n]).norm() / plain[2][n].norm()) for n in plain[2]))
    print(f"{dtype}: loss {apart[0]:.1e}, gradient norm {apart[1]:.1e}, weights {apart[2]:.1e}")
    assert max(apart) <= RELATIVE[dtype]
