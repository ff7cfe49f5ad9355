"""Three optimizer steps on fixed packed rows under a parallel layout; run by torchrun, see test_equality.py.

torchrun --nproc-per-node 2 -m tests.parallel.steps OUT.json --tensor 2 --sequence
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_parallel_r1.model import process
from megatron_parallel_r1.model.config import ModelConfig
from megatron_parallel_r1.model.gpt import build_model
from megatron_parallel_r1.model.optimizer import Adam
from megatron_parallel_r1.model.weights import hf_tensors, load_hf_tensors, random_hf_tensors
from megatron_parallel_r1.thought.layout import lay_out
from megatron_parallel_r1.thought.packing import PackedRow, context_part, pack, padded
from megatron_parallel_r1.thought.parser import parse
from megatron_parallel_r1.train.losses import Clip, grpo_loss
from megatron_parallel_r1.train.microbatch import MicroBatch
from megatron_parallel_r1.train.trainer import Trainer
from tests.reference.traces import TAGS, random_trace

SHAPE = ModelConfig(hidden=32, layers=4, heads=4, kv_heads=2, head_dim=8, ffn=64, vocab=40, rope_theta=1e3)


def packed_rows() -> tuple[list[PackedRow], dict[str, list[list[float]]]]:
    """Packed rows, isolated and replay ones, of different lengths, with advantages and old log-probs."""
    generator = torch.Generator().manual_seed(5)
    rows, values = [], {"advantage": [], "old": []}
    for seed in range(40):
        trace = random_trace(seed, depth=2)
        tree = parse(trace, TAGS)
        sampled = [index not in tree.forced() for index in range(len(trace))]
        rows.append(lay_out([20, 21, 22], trace, sampled, tree, ("isolated", "replay")[seed % 2]))
        advantage = torch.randn((), generator=generator).item()
        values["advantage"].append([advantage] * len(trace))
        values["old"].append((torch.rand(len(trace), generator=generator) - 4.2).tolist())
    half = max(1, sum(map(len, rows)) // 8)
    packed = pack(rows, capacity=half)
    return packed[: len(packed) // 2 * 2], values


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--pipeline", type=int, default=1)
    parser.add_argument("--context", type=int, default=1)
    parser.add_argument("--sequence", action="store_true")
    parser.add_argument("--untied", action="store_true")
    parser.add_argument("--recompute", default="none")
    parser.add_argument("--sharded", action="store_true")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    parallel = process.Parallel(given.tensor, given.pipeline, given.sequence, given.context, given.recompute)
    shape = ModelConfig(
        **{f: getattr(SHAPE, f) for f in SHAPE.__dataclass_fields__} | {"tied": not given.untied}
    )
    with process.running(1, parallel):
        model = build_model(shape, parallel=parallel)
        load_hf_tensors(model, random_hf_tensors(shape, seed=7, std=0.2))
        # eps above the rounding noise of gradients that are 0 in exact arithmetic (rows of unused tokens):
        # Adam would blow that noise up to full steps, in a direction that depends on the order of sums.
        trainer = Trainer(model, Adam(lr=1e-3, eps=1e-6, weight_decay=0.1, sharded=given.sharded))
        packed, values = packed_rows()
        mine = packed[
            parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()
        ]
        multiple = (2 * given.context if given.context > 1 else 1) * (given.tensor if given.sequence else 1)
        batches = [
            MicroBatch.of(
                context_part(
                    padded(row, multiple),
                    parallel_state.get_context_parallel_rank(),
                    given.context,
                ),
                trainer.device,
                values,
            )
            for row in mine
        ]

        def loss(logprobs_N: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            total, clipped = grpo_loss(logprobs_N, batch.values["old"], batch.values["advantage"], Clip())
            return total, {"clipped": clipped}

        steps = [trainer.update(batches, loss, 1e-3) for _ in range(3)]
        weights = {name: tensor.double() for name, tensor in hf_tensors(model)}
        if dist.get_rank() == 0:
            found = {
                "loss": [step.loss for step in steps],
                "entropy": [step.entropy for step in steps],
                "grad_norm": [step.grad_norm for step in steps],
                "clipped": [step.means["clipped"] for step in steps],
                "targets": [step.targets for step in steps],
                "weights": [w.abs().sum().item() for _, w in sorted(weights.items())],
                "rows": [len(packed)],
            }
            given.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
