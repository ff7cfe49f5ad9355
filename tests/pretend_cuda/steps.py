"""Optimizer steps of SFT and GRPO under a layout, or of a mixture of experts, as a program; then the weights
are published, and with a pipeline another trainer goes on from a checkpoint.

python -m tests.pretend_cuda FOLDER tests.pretend_cuda.steps LAYOUT OUT, LAYOUT as "pipeline=2" (launch.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.distributed import process
from megatron_parallel_r1.distributed.parallel_config import ParallelConfig
from megatron_parallel_r1.model.gpt import Model, build_model
from megatron_parallel_r1.model.weights import load_hf_tensors, random_hf_tensors
from megatron_parallel_r1.sync.buckets import gather_buckets, is_sender
from megatron_parallel_r1.sync.disk import DiskTransport
from megatron_parallel_r1.train.checkpoints.folder import Checkpoints
from tests.parallel.launch import parallel_of
from tests.parallel.resume import Job, trainer_of
from tests.parallel.steps import three_steps


def publish(model: Model, shape: ModelConfig, folder: Path) -> None:
    """Packs all weights into buckets on the device, as for servers, and writes them."""
    transport = DiskTransport(folder, 1, shape, torch.bfloat16)
    if is_sender():
        transport.open((), {}, 1)
    for bucket in gather_buckets(model, 10_000):
        assert all(tensor.is_cuda for _, tensor in bucket.tensors)
        if is_sender():
            transport.send(bucket)
    if is_sender():
        assert not transport.close().lost and (folder / "version-1/config.json").is_file()


def save_and_go_on(layout: str, parallel: ParallelConfig, shape: ModelConfig, folder: Path) -> None:
    """Saves a trainer after a step, restores another one from it, and trains that."""
    job = Job(str(folder), str(folder / "checkpoints"), layout, "bfloat16")
    for expected in (0, 1):
        trainer, batches = trainer_of(job, parallel, shape)
        checkpoints = Checkpoints(Path(job.checkpoints))
        assert checkpoints.restore(trainer)[0] == expected
        trainer.update(batches, lambda logprobs_N, *_: (-logprobs_N.sum(), {}), 1e-3)
        checkpoints.save(trainer, expected + 1, {})
        checkpoints.settle()


def main() -> None:
    layout, out = sys.argv[1], Path(sys.argv[2])
    parallel, shape = parallel_of(layout)
    with process.running(1, parallel):
        for loss in ("sft", "grpo"):
            three_steps(shape, parallel, torch.bfloat16, loss)
        model = build_model(shape, torch.bfloat16, parallel)
        load_hf_tensors(model, random_hf_tensors(shape, seed=7, std=0.2))
        publish(model, shape, out / "weights")
        if parallel.pipeline > 1:
            save_and_go_on(layout, parallel, shape, out)


if __name__ == "__main__":
    main()
