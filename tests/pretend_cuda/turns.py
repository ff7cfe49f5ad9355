"""Updates between which gradients and optimizer leave the device, as a program: the memory that becomes free,
and training that does not notice.

python -m tests.pretend_cuda FOLDER tests.pretend_cuda.turns
"""

from __future__ import annotations

import gc
from dataclasses import replace

import torch

from megatron_parallel_r1.distributed import process
from megatron_parallel_r1.distributed.parallel_config import ParallelConfig
from megatron_parallel_r1.model.gpt import build_model
from megatron_parallel_r1.model.weights import load_hf_tensors, random_hf_tensors
from megatron_parallel_r1.sync.buckets import gather_buckets
from megatron_parallel_r1.train.micro_batch import MicroBatch, partition_rows
from megatron_parallel_r1.train.offload import _device_tensors
from megatron_parallel_r1.train.trainer import Adam, Trainer
from tests.parallel.launch import SHAPE as FOUR_LAYERS
from tests.parallel.steps import batch_of_rows
from tests.pretend_cuda.tensor import PretendTensor

SHAPE = replace(FOUR_LAYERS, layers=1)


def device_bytes() -> int:
    """The storages of all tensors that are on the device now."""
    gc.collect()
    tensors = [value for value in gc.get_objects() if isinstance(value, PretendTensor)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def take_turns(trainer: Trainer, batches: list[MicroBatch], freed_at_least: int) -> None:
    """Offloads, does with the weights what a rollout does, and onloads."""
    before, held = device_bytes(), [tensor.clone() for tensor in _device_tensors(trainer.optimizer)]
    clones = sum(tensor.nbytes for tensor in held)
    trainer.memory.offload()
    trainer.memory.offload()
    freed = before + clones - device_bytes()
    assert freed >= freed_at_least, (freed, freed_at_least)
    assert list(gather_buckets(trainer.model, 10_000))
    trainer.memory.onload()
    back = list(_device_tensors(trainer.optimizer))
    assert held and all(torch.equal(a, b) for a, b in zip(held, back, strict=True))
    assert not any(buffer.grad_data.any() for stage in trainer.wrapped for buffer in stage.buffers)


def train(dtype: torch.dtype, sharded: bool, turns: bool) -> list[torch.Tensor]:
    """The weights after two updates."""
    model = build_model(SHAPE, dtype)
    load_hf_tensors(model, random_hf_tensors(SHAPE, seed=7, std=0.2))
    trainer = Trainer(model, Adam(lr=1e-3, sharded=sharded))
    rows, values = batch_of_rows()
    own = partition_rows(rows, max(map(len, rows)), trainer.partition)[:2]
    batches = [MicroBatch.of(row, trainer.device, values) for row in own]
    weights = sum(parameter.numel() for parameter in model.parameters())
    # Gradients, two moments, and master weights of 16-bit ones, all in float32.
    freed = 4 * weights * (3 if dtype == torch.float32 else 4)
    for _ in range(2):
        trainer.update(batches, lambda logprobs_N, *_: (-logprobs_N.sum(), {}), 1e-3)
        if turns:
            take_turns(trainer, batches, freed)
    return [parameter.detach() for parameter in model.parameters()]


def main() -> None:
    with process.running(1, ParallelConfig()):
        # In float32 the sharded optimizer's tensors are views of the model's weights.
        for dtype, sharded in ((torch.bfloat16, True), (torch.float32, True)):
            plain, turned = (train(dtype, sharded, turns) for turns in (False, True))
            assert all(torch.equal(a, b) for a, b in zip(plain, turned, strict=True))


if __name__ == "__main__":
    main()
