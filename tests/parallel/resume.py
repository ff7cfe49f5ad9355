"""Optimizer steps with a checkpoint, under parallel layouts in turn; run by torchrun, see test_resume.py.

torchrun --nproc-per-node 2 -m tests.parallel.resume JOBS.json

JOBS.json is a list of `Job`s. Each restores the last checkpoint, if there is one, and trains. Its `out` is a
folder: `steps.json` has what the steps measured, `state<rank>.pt` the training state as of the checkpoint,
`weights.pt` the final weights, `error<rank>.json` what ended it early or null.
"""

from __future__ import annotations

import json
import resource
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.distributed import process
from megatron_parallel_r1.distributed.parallel_config import ParallelConfig
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.model.gpt import build_model
from megatron_parallel_r1.model.weights import hf_tensors, load_hf_tensors, random_hf_tensors
from megatron_parallel_r1.train.checkpoints.folder import Checkpoints
from megatron_parallel_r1.train.checkpoints.sharded import live_parts
from megatron_parallel_r1.train.micro_batch import MicroBatch, partition_rows
from megatron_parallel_r1.train.trainer import Adam, Trainer
from tests.parallel.launch import parallel_of
from tests.parallel.steps import batch_of_rows, capacity


@dataclass(frozen=True)
class Job:
    """
    Attributes:
        out, checkpoints: folders.
        layout: see launch.py.
        save_after: steps before a checkpoint; 0: none is saved.
        steps: after it.
        full_disk: this process cannot write files of more than 4 KiB.
    """

    out: str
    checkpoints: str
    layout: str
    dtype: str = "float32"
    save_after: int = 0
    steps: int = 2
    full_disk: int | None = None


def trainer_of(job: Job, parallel: ParallelConfig, shape: ModelConfig) -> tuple[Trainer, list[MicroBatch]]:
    """A fresh trainer and this process's share of the rows."""
    model = build_model(shape, getattr(torch, job.dtype), parallel)
    load_hf_tensors(model, random_hf_tensors(shape, seed=7, std=0.2))
    # eps: see steps.py.
    adam = Adam(lr=1e-3, eps=1e-6, weight_decay=0.1, sharded=parallel.sharded_optimizer)
    trainer = Trainer(model, adam)
    rows, _ = batch_of_rows()
    own = partition_rows(rows, capacity(rows, parallel), trainer.partition)
    return trainer, [MicroBatch.of(row, trainer.device) for row in own]


def work(job: Job, parallel: ParallelConfig, shape: ModelConfig) -> None:
    out = Path(job.out)
    trainer, batches = trainer_of(job, parallel, shape)

    def train(steps: int) -> list[list[float]]:
        done = [
            trainer.update(batches, lambda logprobs_N, *_: (-logprobs_N.sum(), {}), 1e-3)
            for _ in range(steps)
        ]
        return [[step.loss, step.grad_norm] for step in done]

    checkpoints = Checkpoints(Path(job.checkpoints))
    error, found, state, measured = None, None, (0, []), []
    try:
        found, _ = checkpoints.restore(trainer)
        if job.save_after:
            train(job.save_after)
            if job.full_disk == dist.get_rank():
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
            checkpoints.save(trainer, found + job.save_after, {})
        state = (
            trainer.optimizer_steps,
            [
                (part.key, part.global_offset, tuple(part.global_shape), part.data.clone())
                for part in live_parts(trainer)
            ],
        )
        for _ in range(job.steps):
            measured += train(1)
            checkpoints.poll()
        checkpoints.settle()
    except UserError as raised:
        error = str(raised)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    torch.save(state, out / f"state{dist.get_rank()}.pt")
    (out / f"error{dist.get_rank()}.json").write_text(json.dumps(error))
    weights = {name: tensor.clone() for name, tensor in hf_tensors(trainer.model)}
    if dist.get_rank() == 0:
        (out / "steps.json").write_text(json.dumps({"found": found, "measured": measured}))
        torch.save(weights, out / "weights.pt")


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for job in [Job(**fields) for fields in json.loads(Path(sys.argv[1]).read_text())]:
        print(job, flush=True)
        Path(job.out).mkdir(exist_ok=True)
        parallel, shape = parallel_of(job.layout)
        with process.running(1, parallel):
            work(job, parallel, shape)


if __name__ == "__main__":
    main()
