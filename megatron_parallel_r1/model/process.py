"""This process's place among all: torch.distributed, Megatron's parallel groups, random states."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.model import cpu


@dataclass(frozen=True, slots=True)
class Parallel:
    """How a model is split over processes; what is left of the world is data parallel.

    Attributes:
        tensor, pipeline, context: sizes of the groups that share one copy of the model; a context group
            shares each row.
        sequence: whether norms and residuals are split along the tokens within a tensor group.
        recompute: what backward computes anew instead of keeping it: `full`, each layer from its input;
            `selective`, the inside of the MLP (attention keeps no scores in any case).
    """

    tensor: int = 1
    pipeline: int = 1
    sequence: bool = False
    context: int = 1
    recompute: Literal["none", "selective", "full"] = "none"


def start(seed: int, parallel: Parallel | None = None, timeout_minutes: float = 30) -> None:
    """Joins the processes that torchrun started (RANK, WORLD_SIZE), or becomes a world of one, and splits it.

    Uses nccl and the local rank's GPU where CUDA is available, else gloo and the CPU.

    Args:
        seed: of Megatron's random states; the same on all processes.
        parallel: sizes of the model-parallel groups; None for one process a copy.
        timeout_minutes: how long a collective may wait for the others.

    Raises:
        UserError: the number of processes is no multiple of tensor x pipeline x context.
    """
    parallel = parallel or Parallel()
    cpu.bring_up()
    timeout = timedelta(minutes=timeout_minutes)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
    copy = parallel.tensor * parallel.pipeline * parallel.context
    if dist.get_world_size() % copy:
        world = dist.get_world_size()
        dist.destroy_process_group()
        raise UserError(
            f"parallel: tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context} "
            f"= {copy} does not divide the {world} processes; start a multiple of {copy}"
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def stop() -> None:
    """Leaves the world that `start` joined."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@contextmanager
def running(seed: int, parallel: Parallel | None = None) -> Iterator[None]:
    """`start` on entry, `stop` on exit."""
    start(seed, parallel)
    try:
        yield
    finally:
        stop()
