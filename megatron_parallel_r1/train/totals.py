"""Sums over all processes, told to all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state


def total(reports: Sequence[dict[str, torch.Tensor]], device: torch.device) -> dict[str, float]:
    """Sums scalars of the same names over micro-batches and over data- and context-parallel processes.

    Args:
        reports: of this process's micro-batches; empty on all but the last pipeline stage, which tells the
            others.
    """
    names: list[str] = sorted(reports[0]) if reports else []
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    if pipeline.size() > 1:
        told = [names]
        dist.broadcast_object_list(told, last, group=pipeline)
        names = told[0]
    sums = torch.zeros(len(names), dtype=torch.float64, device=device)
    for report in reports:
        sums += torch.stack([report[name].double() for name in names])
    if reports:
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    if pipeline.size() > 1:
        dist.broadcast(sums, last, group=pipeline)
    return dict(zip(names, sums.tolist(), strict=True))


def highest(value: float, device: torch.device) -> float:
    """The largest of all processes' values."""
    most = torch.tensor(value, dtype=torch.float64, device=device)
    if dist.get_world_size() > 1:
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return most.item()
