"""Optimizer steps with a checkpoint, under a parallel layout; run by torchrun, see test_resume.py.

torchrun --nproc-per-node 2 -m tests.parallel.resume OUT CHECKPOINTS --tensor 2 --save-after 2 --steps 2

Restores the last checkpoint, if there is one, and trains. OUT is a folder: `steps.json` has what the steps
measured, `state<rank>.pt` the training state as of the checkpoint, `weights.pt` the final
weights, `error<rank>.json` what ended it early or null.
"""

from __future__ import annotations

import argparse
import json
import resource
import warnings
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.model import process
from megatron_parallel_r1.model.gpt import build_model
from megatron_parallel_r1.model.optimizer import Adam
from megatron_parallel_r1.model.parallel import Parallel
from megatron_parallel_r1.model.weights import hf_tensors, load_hf_tensors, random_hf_tensors
from megatron_parallel_r1.train.checkpoints.folder import Checkpoints
from megatron_parallel_r1.train.checkpoints.sharded import live_parts, steps_taken
from megatron_parallel_r1.train.microbatch import MicroBatch
from megatron_parallel_r1.train.share import share_out
from megatron_parallel_r1.train.trainer import Trainer
from tests.parallel.steps import SHAPE, batch_of_rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("checkpoints", type=Path)
    for size in ("tensor", "pipeline", "interleaved", "context"):
        parser.add_argument(f"--{size}", type=int, default=1)
    parser.add_argument("--sharded", action="store_true")
    parser.add_argument("--sequence", action="store_true")
    parser.add_argument("--untied", action="store_true")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--save-after", type=int, default=0, help="steps before the checkpoint")
    parser.add_argument("--steps", type=int, default=2, help="steps after it")
    parser.add_argument("--full-disk", type=int, help="this process cannot write files of more than 4 KiB")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    parallel = Parallel(
        tensor=given.tensor,
        pipeline=given.pipeline,
        virtual=given.interleaved,
        context=given.context,
        sequence=given.sequence,
        sharded_optimizer=given.sharded,
    )
    # An odd vocabulary, which a tensor group of two has to pad.
    shape = replace(SHAPE, vocab=41, tied=not given.untied)
    given.out.mkdir(exist_ok=True)
    with process.running(1, parallel):
        model = build_model(shape, getattr(torch, given.dtype), parallel)
        load_hf_tensors(model, random_hf_tensors(shape, seed=7, std=0.2))
        # eps: see steps.py.
        trainer = Trainer(model, Adam(lr=1e-3, eps=1e-6, weight_decay=0.1, sharded=given.sharded))
        rows, _ = batch_of_rows()
        capacity = sum(map(len, rows)) // 8
        mine = share_out(rows, capacity - capacity % parallel.multiple, trainer.place)
        batches = [MicroBatch.of(row, trainer.device) for row in mine]

        def train(steps: int) -> list[list[float]]:
            done = [
                trainer.update(batches, lambda logprobs_N, *_: (-logprobs_N.sum(), {}), 1e-3)
                for _ in range(steps)
            ]
            return [[step.loss, step.grad_norm] for step in done]

        checkpoints = Checkpoints(given.checkpoints)
        error, found, state, measured = None, None, (0, []), []
        try:
            found, _ = checkpoints.restore(trainer)
            if given.save_after:
                train(given.save_after)
                if given.full_disk == dist.get_rank():
                    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
                checkpoints.save(trainer, found + given.save_after, {})
            state = (
                steps_taken(trainer.optimizer),
                [
                    (part.key, part.global_offset, tuple(part.global_shape), part.data.clone())
                    for part in live_parts(trainer)
                ],
            )
            for _ in range(given.steps):
                measured += train(1)
                checkpoints.poll()
            checkpoints.settle()
        except UserError as raised:
            error = str(raised)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        torch.save(state, given.out / f"state{dist.get_rank()}.pt")
        (given.out / f"error{dist.get_rank()}.json").write_text(json.dumps(error))
        weights = {name: tensor.clone() for name, tensor in hf_tensors(model)}
        if dist.get_rank() == 0:
            (given.out / "steps.json").write_text(json.dumps({"found": found, "measured": measured}))
            torch.save(weights, given.out / "weights.pt")


if __name__ == "__main__":
    main()
