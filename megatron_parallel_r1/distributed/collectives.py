"""Collectives over Python objects and scalars, and over the model's replicas.

All ranks of a replica (a data-parallel rank) work on the same part; its first rank, the leader, reports it.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_parallel_r1.errors import UserError

T = TypeVar("T")
Items = TypeVar("Items", bound=Sequence)


def all_gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Returns every rank's picklable `value`, in rank order, on every rank.

    Args:
        group: a group of all ranks to use instead of the default one.
    """
    if dist.get_world_size() == 1:
        return [value]
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def gather_bytes(payload: bytes, group: dist.ProcessGroup | None = None) -> list[memoryview]:
    """Returns every rank's bytes, in rank order, on every rank; those of a rank without any cost nothing.

    Args:
        group: a group of all ranks to use instead of the default one.
    """
    if dist.get_world_size() == 1:
        return [memoryview(payload)]
    device = torch.device("cpu" if dist.get_backend(group) == "gloo" else "cuda")
    sizes_W = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    sizes_W[dist.get_rank()] = len(payload)
    dist.all_reduce(sizes_W, group=group)
    found = []
    for source, size in enumerate(sizes_W.tolist()):
        buffer_B = torch.empty(size, dtype=torch.uint8, device=device)
        if size and source == dist.get_rank():
            buffer_B.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
        if size:
            dist.broadcast(buffer_B, source, group=group)
        found.append(buffer_B.cpu().numpy().data)
    return found


def exchange_bytes(payload: bytes, sent: Sequence[int], received: Sequence[int]) -> memoryview:
    """Sends each rank its part of `payload`; returns the parts that all ranks sent to this one, concatenated.

    Args:
        sent, received: bytes to and from each rank, in rank order.
    """
    device = torch.device("cpu" if dist.get_backend() == "gloo" else "cuda")
    parts_B = torch.frombuffer(bytearray(payload or b"\0"), dtype=torch.uint8)[: len(payload)].to(device)
    found_B = torch.empty(sum(received), dtype=torch.uint8, device=device)
    dist.all_to_all_single(found_B, parts_B, list(received), list(sent))
    return found_B.cpu().numpy().data


def gather_objects(value: T) -> list[T]:
    """Returns every rank's picklable `value`, in rank order, on rank 0, and an empty list elsewhere."""
    if dist.get_world_size() == 1:
        return [value]
    values = [value] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values)
    return values or []


def run_on_rank_zero(work: Callable[[], T]) -> T:
    """Runs `work` on rank 0; every rank returns its picklable result or raises its error."""
    outcome: list[tuple[T | None, Exception | None]] = [(None, None)]
    if dist.get_rank() == 0:
        try:
            outcome = [(work(), None)]
        except Exception as error:  # of any type: the other ranks would wait for ever
            outcome = [(None, _sendable(error))]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(outcome, src=0)
    result, failure = outcome[0]
    if failure is not None:
        if isinstance(failure, UserError):
            failure.on_all_ranks = True
        raise failure
    return cast(T, result)


def run_on_ranks(work: Callable[[], T] | None) -> list[T]:
    """Runs `work` on the ranks where it is not None.

    Returns:
        On every rank, the picklable results in the order of the ranks.

    Raises:
        Exception: `work` raised it on one rank; every rank then raises it.
    """
    outcome: tuple[list[T], Exception | None] = ([], None)
    if work is not None:
        try:
            outcome = ([work()], None)
        except Exception as error:  # of any type: the other ranks would wait for ever
            outcome = ([], _sendable(error))
    outcomes = all_gather_objects(outcome)
    for _, failure in outcomes:
        if failure is not None:
            if isinstance(failure, UserError):
                failure.on_all_ranks = True
            raise failure
    return [result for results, _ in outcomes for result in results]


def _sendable(error: Exception) -> Exception:
    """Returns the error, or one with its text if pickle cannot copy it: the others would wait for ever."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a class of the user's raises
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def all_ranks_true(flag: bool, device: torch.device) -> bool:
    """All-reduces `flag` with a logical AND over all ranks."""
    if dist.get_world_size() == 1:
        return flag
    reduced = torch.tensor(float(flag), device=device)
    dist.all_reduce(reduced, op=dist.ReduceOp.MIN)
    return bool(reduced.item())


def any_rank_true(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """All-reduces each of `flags` with a logical OR over all ranks."""
    return [bool(flag) for flag in largest_each([float(flag) for flag in flags], device)]


def largest_each(values: Sequence[float], device: torch.device) -> list[float]:
    """Returns the largest of all ranks at each place of `values`, rounded to float32; one collective."""
    if dist.get_world_size() == 1:
        return list(values)
    reduced = torch.tensor(values, dtype=torch.float32, device=device)
    dist.all_reduce(reduced, op=dist.ReduceOp.MAX)
    return reduced.tolist()


def all_reduce_max(values: Sequence[float], device: torch.device) -> list[float]:
    """Returns the largest of all ranks, for each of `values`."""
    reduced = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.get_world_size() > 1:
        dist.all_reduce(reduced, op=dist.ReduceOp.MAX)
    return reduced.tolist()


def barrier() -> None:
    """Waits until every rank is here; what a rank wrote before, every rank can read afterwards."""
    if dist.get_world_size() > 1:
        dist.barrier()


def sum_metrics(reports: Sequence[dict[str, torch.Tensor]], device: torch.device) -> dict[str, float]:
    """Sums scalars by name over micro-batches and over data- and context-parallel ranks.

    Args:
        reports: one dict for each of this rank's micro-batches; empty on all but the last pipeline stage,
            which broadcasts the sums to the others.
    """
    names: list[str] = sorted(reports[0]) if reports else []
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    if pipeline.size() > 1:
        message = [names]
        dist.broadcast_object_list(message, last, group=pipeline)
        names = message[0]
    sums = torch.zeros(len(names), dtype=torch.float64, device=device)
    for report in reports:
        sums += torch.stack([report[name].double() for name in names])
    if reports:
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    if pipeline.size() > 1:
        dist.broadcast(sums, last, group=pipeline)
    return dict(zip(names, sums.tolist(), strict=True))


def is_replica_leader() -> bool:
    """Returns whether this is the first rank of its replica, the one that reports results."""
    ranks = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_context_parallel_rank(),
    )
    return not any(ranks)


def replica_slice(items: Items) -> Items:
    """Returns this replica's part of `items`: consecutive ones, in nearly equal parts."""
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    return cast(Items, items[len(items) * rank // size : len(items) * (rank + 1) // size])


def gather_from_replicas(work: Callable[[], Sequence[T]], group: dist.ProcessGroup | None = None) -> list[T]:
    """Concatenates what the replicas compute, in their order, on every rank.

    Args:
        work: computes this replica's part, picklable; only the leaders' results are gathered.
        group: a group of all ranks to use instead of the default one.

    Raises:
        Exception: `work` raised it on one rank; every rank then raises it, so that none waits for another.
    """
    part: Sequence[T] = ()
    problem: Exception | None = None
    try:
        part = work()
    except Exception as error:  # of any type: the other ranks would wait for ever
        problem = error
    outcome = (part if is_replica_leader() else (), problem and _sendable(problem))
    # Among leaders, global ranks rise with the data-parallel rank.
    parts = gather_bytes(pickle.dumps(outcome) if is_replica_leader() or problem else b"", group)
    results = [pickle.loads(part) for part in parts if len(part)]
    problems = [problem for _, problem in results if problem is not None]
    if problems:
        if isinstance(problems[0], UserError):
            problems[0].on_all_ranks = True
        raise problems[0]
    return [item for part, _ in results for item in part]


@contextmanager
def background_groups(
    timeout_s: float, enabled: bool = True
) -> Iterator[tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]]:
    """Creates a second tensor-parallel group and a second world group (gloo), for use by another thread.

    Two threads that share a group could issue their collectives in a different order on each rank. Every rank
    must enter. The groups are destroyed on exit, but not after an error: that may wait for a lost rank.

    Args:
        timeout_s: time-out of their collectives.
        enabled: if not, creates none and yields None for both, which stand for the default groups.
    """
    if not enabled:
        yield None, None
        return
    own_ranks = dist.get_process_group_ranks(parallel_state.get_tensor_model_parallel_group())
    timeout = timedelta(seconds=timeout_s)
    # Every rank takes part in creating every group, in the same order.
    every = sorted({tuple(ranks) for ranks in all_gather_objects(own_ranks)})
    tensor = {ranks: dist.new_group(ranks, timeout) for ranks in every}
    world = dist.new_group(timeout=timeout, backend="gloo")
    yield tensor[tuple(own_ranks)], world
    barrier()
    for group in (*tensor.values(), world):
        dist.destroy_process_group(group)
