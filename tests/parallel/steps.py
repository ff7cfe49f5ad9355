"""Three optimizer steps on fixed rows under a parallel layout, for both losses, with and without recompute,
with the sharded optimizer and in bfloat16, and three of the whole way from traces to weights (learning.py);
run by torchrun, see test_equality.py.

torchrun --nproc-per-node 2 -m tests.parallel.steps OUT.pt "tensor=2 sequence untied" "pipeline=2"

One layout after the other; an empty one is data parallel alone. OUT.pt has for each of them what each variant
measured, and its weights.
"""

from __future__ import annotations

import sys
import warnings
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.config.objective import Objective
from megatron_parallel_r1.distributed import process
from megatron_parallel_r1.distributed.parallel_config import ParallelConfig
from megatron_parallel_r1.model.gpt import build_model
from megatron_parallel_r1.model.layers import Layers
from megatron_parallel_r1.model.weights import hf_tensors, load_hf_tensors, random_hf_tensors
from megatron_parallel_r1.rl.objective.loss import policy_loss
from megatron_parallel_r1.sft.loop import sft_loss
from megatron_parallel_r1.thought.layout import Row, lay_out
from megatron_parallel_r1.thought.parser import parse
from megatron_parallel_r1.train import trainer as trainer_module
from megatron_parallel_r1.train.micro_batch import MicroBatch, partition_rows
from megatron_parallel_r1.train.trainer import Adam, Trainer
from megatron_parallel_r1.utils.rank import is_rank_zero
from tests.parallel.launch import parallel_of
from tests.parallel.learning import LESSONS, three_lessons
from tests.reference.traces import TAGS, random_trace

OBJECTIVES = {
    "grpo": Objective(),
    # Without a ratio that a rounding can push over its bound, which switches a token's gradient off.
    "on-policy": Objective(),
    # Sums over a whole trace, whose row is cut under context parallelism.
    "gspo": Objective(ratio="sequence", correction="truncate", correction_level="sequence"),
}
TRACES = 24


@cache
def batch_of_rows() -> tuple[list[Row], dict[str, list[list[float]]]]:
    """Isolated and replay rows of different lengths, with advantages and old log-probs."""
    generator = torch.Generator().manual_seed(5)
    rows, values = [], {"advantage": [], "weight": [], "old": [], "engine": []}
    for seed in range(TRACES):
        trace = random_trace(seed, depth=2)
        tree = parse(trace, TAGS)
        forced = tree.forced()
        sampled = [index not in forced for index in range(len(trace))]
        rows.append(lay_out([20, 21, 22], trace, sampled, tree, ("isolated", "replay")[seed % 2]))
        advantage = torch.randn((), generator=generator).item()
        values["advantage"].append([advantage] * len(trace))
        values["weight"].append([TRACES / len(trace)] * len(trace))
        values["old"].append((torch.rand(len(trace), generator=generator) - 4.2).tolist())
        values["engine"].append((torch.rand(len(trace), generator=generator) - 4.2).tolist())
    return rows, values


def capacity(rows: list[Row], parallel: ParallelConfig) -> int:
    """Tokens of a micro-batch, so that there are four, of which the last holds little."""
    tokens = sum(map(len, rows)) // 3
    return tokens - tokens % parallel.row_multiple


def three_steps(
    shape: ModelConfig,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    loss_name: str,
    balance: float = 0.0,
) -> dict[str, Any]:
    """Figures of three optimizer steps, and the weights that they end in."""
    model = build_model(shape, dtype, parallel, Layers(balance_loss=balance))
    load_hf_tensors(model, random_hf_tensors(shape, seed=7, std=0.2))
    # eps above the rounding noise of gradients that are 0 in exact arithmetic (rows of unused tokens): Adam
    # would blow that noise up to full steps, in a direction that depends on the order of sums.
    sharded, overlap = parallel.sharded_optimizer, parallel.overlap_gradients
    trainer = Trainer(model, Adam(1e-3, eps=1e-6, weight_decay=0.1, sharded=sharded, overlap=overlap))
    rows, values = batch_of_rows()
    own = partition_rows(rows, capacity(rows, parallel), trainer.partition)
    if loss_name == "on-policy":
        values = {name: values[name] for name in values.keys() - {"old"}}
    batches = [MicroBatch.of(row, trainer.device, values) for row in own]

    def loss(
        logprobs_N: torch.Tensor, entropies_N: torch.Tensor, batch: MicroBatch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if loss_name == "sft":
            return sft_loss(logprobs_N), {"clipped": torch.zeros(())}
        total, sums = policy_loss(
            logprobs_N, entropies_N, batch.values, OBJECTIVES[loss_name], batch.segments
        )
        return total, {"clipped": sums["clipped_low"] + sums["clipped_high"]}

    steps = [trainer.update(batches, loss, 1e-3) for _ in range(3)]
    return {
        "loss": [step.loss for step in steps],
        "entropy": [step.entropy for step in steps],
        "grad_norm": [step.grad_norm for step in steps],
        "clipped": [step.means["clipped"] for step in steps],
        "targets": [step.targets for step in steps],
        "weights": {name: weight.float().clone() for name, weight in hf_tensors(model)},
    }


def variants(shape: ModelConfig, parallel: ParallelConfig, processes: int) -> dict[str, dict[str, Any]]:
    """What each of them measured, by its name: what is trained, comma, how.

    Recomputation is the model's affair and a loss is none of its: from four processes on, whose steps cost
    most, each way of recomputing meets one loss. A model with experts goes through less: the losses are shown
    by the dense one, and bfloat16 changes the choice of experts.
    """
    found = {}
    if processes > parallel.replica_size:
        overlapped = parallel.replace(sharded_optimizer=True, overlap_gradients=True)
        found["grpo, overlapped"] = three_steps(shape, overlapped, torch.float32, "grpo")
    if parallel.context > 1:
        again = parallel.replace(gather_again=True)
        found["grpo, gathered again"] = three_steps(shape, again, torch.float32, "grpo")
    if processes == parallel.pipeline == 2 and parallel.virtual == 1:
        uneven = parallel.replace(first_stage_layers=1)
        found["grpo, uneven"] = three_steps(shape, uneven, torch.float32, "grpo")
    if shape.experts:
        for recompute in ("none", "selective")[: 2 if processes < 4 else 1]:
            changed = parallel.replace(recompute=recompute)
            found[f"grpo, recompute {recompute}"] = three_steps(shape, changed, torch.float32, "grpo")
        # With experts chosen from outside, which must be the same when a layer is computed anew.
        lesson = "path credit"
        for recompute in {1: ("none",), 2: ("selective", "full")}.get(processes, ("selective",)):
            changed = parallel.replace(recompute=recompute)
            found[f"{lesson}, recompute {recompute}"] = three_lessons(shape, changed, LESSONS[lesson])
        sharded = parallel.replace(sharded_optimizer=True)
        found["grpo, sharded optimizer"] = three_steps(shape, sharded, torch.float32, "grpo")
        found["balanced, recompute none"] = three_steps(shape, parallel, torch.float32, "grpo", balance=0.1)
        return found
    for recompute, losses in {
        "none": ("grpo", "sft"),
        "full": ("sft", "grpo"),
        "selective": ("grpo", "sft"),
    }.items():
        for loss in losses if processes < 4 or recompute == "none" else losses[:1]:
            changed = parallel.replace(recompute=recompute)
            found[f"{loss}, recompute {recompute}"] = three_steps(shape, changed, torch.float32, loss)
    found["gspo, recompute none"] = three_steps(shape, parallel, torch.float32, "gspo")
    for name, lesson in LESSONS.items():
        found[f"{name}, recompute none"] = three_lessons(shape, parallel, lesson)
    sharded = parallel.replace(sharded_optimizer=True)
    found["grpo, sharded optimizer"] = three_steps(shape, sharded, torch.float32, "grpo")
    for loss in ("on-policy", "sft")[: 2 if processes < 4 else 1]:
        found[f"{loss}, bfloat16"] = three_steps(shape, parallel, torch.bfloat16, loss)
    return found


def main() -> None:
    out, *layouts = sys.argv[1:]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    # Several buckets, where gradients are summed while backward runs.
    trainer_module.BUCKET_ELEMENTS = 5000
    found = {}
    for layout in layouts:
        parallel, shape = parallel_of(layout)
        print(f"layout: {layout or 'data parallel'}", flush=True)
        with process.running(1, parallel):
            found[layout] = variants(shape, parallel, dist.get_world_size())
    if is_rank_zero():
        torch.save(found, out)


if __name__ == "__main__":
    main()
