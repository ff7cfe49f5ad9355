"""Gathers a split model's weights, under their Hugging Face names, on the sender, one bucket at a time.

The sender is the first rank of the first replica. Each stage's tensor group gathers the shards of one
parameter on its first rank, and later stages send whole tensors to the sender. An expert that other ranks
hold comes, whole, from the first of them to the first rank of its stage. With servers beside every rank,
every rank is a sender: each replica gathers for itself, on all of its ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_parallel_r1.architecture.weight_table import WeightMapping
from megatron_parallel_r1.model.gpt import Model
from megatron_parallel_r1.model.weights import (
    expert_rank,
    own_parameters,
    owned_weights,
    plain,
    split_group,
)


@dataclass(frozen=True, slots=True)
class Bucket:
    """Some weights.

    Attributes:
        tensors: names and contiguous tensors; some share memory with the model. Emptied when the next bucket
            is requested.
    """

    tensors: list[tuple[str, Tensor]]
    last: bool

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for _name, tensor in self.tensors)


Part = tuple[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class BucketPlan:
    """The content of a bucket: consecutive parameters that one pipeline rank owns."""

    owner: int
    weights: tuple[WeightMapping, ...]

    @property
    def parts(self) -> list[Part]:
        """Names and shapes of the Hugging Face tensors."""
        return [part for weight in self.weights for part in weight.parts]


def in_first_replica() -> bool:
    """Whether this rank's shard is sent; the other replicas hold the same."""
    return not (parallel_state.get_data_parallel_rank() or parallel_state.get_context_parallel_rank())


def in_first_experts() -> bool:
    """Whether this rank's shards of experts are sent; other ranks may hold the same."""
    return parallel_state.get_expert_data_parallel_rank() == 0


def is_sender() -> bool:
    """Whether this rank speaks to the servers: the first of the world."""
    return dist.get_rank() == 0


def plan_buckets(
    owned: Sequence[tuple[int, WeightMapping]], itemsize: int, bucket_bytes: int
) -> list[BucketPlan]:
    """Groups parameters into buckets, stage by stage.

    Args:
        owned: each parameter with the pipeline rank that sends it.
        bucket_bytes: maximum size of a bucket; a larger parameter has one for itself.
    """
    buckets: list[BucketPlan] = []
    left = 0
    for owner, weight in sorted(owned, key=lambda pair: pair[0]):
        size = itemsize * sum(torch.Size(shape).numel() for _name, shape in weight.parts)
        if not buckets or size > left or buckets[-1].owner != owner:
            buckets.append(BucketPlan(owner, ()))
            left = bucket_bytes
        buckets[-1] = BucketPlan(owner, (*buckets[-1].weights, weight))
        left -= size
    return buckets


@torch.no_grad()
def gather_buckets(model: Model, bucket_bytes: int, everywhere: bool = False) -> Iterator[Bucket]:
    """Yields the model's weights on the sender, and nothing on other ranks; all must iterate to the end.

    Beside its shards a rank holds at most one bucket and the shards of one parameter.

    Args:
        everywhere: yield them on every rank.
    """
    dense, experts = (everywhere or first for first in (in_first_replica(), in_first_experts()))
    if not (dense or experts):
        return
    own = own_parameters(model)
    leads = in_first_replica() and parallel_state.get_tensor_model_parallel_rank() == 0
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    like = next(model.parameters())
    buckets = plan_buckets(owned_weights(model, own), like.itemsize, bucket_bytes)
    for number, planned in enumerate(buckets, 1):
        tensors: list[tuple[str, Tensor]] = []
        if planned.owner == pipeline.rank():
            for weight in planned.weights:
                if (holder := expert_rank(model, weight)) is None:
                    if dense:
                        tensors += _gather_shards(weight, plain(own[weight.name]), everywhere)
                elif experts:
                    tensors += _gather_expert(weight, holder, own.get(weight.name), like, everywhere)
        if everywhere:
            _broadcast(planned.parts, tensors, like, pipeline, planned.owner)
        elif leads:
            _send_to_first(planned.parts, tensors, like, pipeline, planned.owner)
        if everywhere or is_sender():
            yield Bucket(tensors, number == len(buckets))
        # The consumer may still hold the bucket while the next one is filled.
        tensors.clear()


def _gather_shards(weight: WeightMapping, shard: Tensor, everywhere: bool) -> list[tuple[str, Tensor]]:
    """One parameter's tensors on the first of the ranks that split it, nothing on the others; or on all."""
    group = split_group(weight)
    gets = everywhere or group.rank() == 0
    shards = [shard]
    if group.size() > 1 and weight.split_dim is not None:
        shards = [
            torch.empty_like(shard, memory_format=torch.contiguous_format) for _ in range(group.size() * gets)
        ]
        if everywhere:
            dist.all_gather(shards, shard.contiguous(), group)
        else:
            dist.gather(shard.contiguous(), shards or None, dist.get_global_rank(group, 0), group)
    if not gets:
        return []
    names = (name for name, _shape in weight.parts)
    return [(name, part.contiguous()) for name, part in zip(names, weight.split(shards), strict=True)]


def _gather_expert(
    weight: WeightMapping, holder: int, parameter: Tensor | None, like: Tensor, everywhere: bool
) -> list[tuple[str, Tensor]]:
    """An expert's tensors on the first rank of its stage, or on all ranks.

    Args:
        holder: the expert-parallel rank that has the expert.
        parameter: this rank's shard, if it has one.
    """
    tensors: list[tuple[str, Tensor]] = []
    if parameter is not None:
        tensors = _gather_shards(weight, plain(parameter), everywhere)
    group = parallel_state.get_expert_model_parallel_group()
    if everywhere:
        _broadcast(weight.parts, tensors, like, group, holder)
    elif parallel_state.get_expert_tensor_parallel_rank() == 0:
        _send_to_first(weight.parts, tensors, like, group, holder)
    return tensors if everywhere or group.rank() == 0 else []


def _broadcast(
    parts: Sequence[Part],
    tensors: list[tuple[str, Tensor]],
    like: Tensor,
    group: dist.ProcessGroup,
    owner: int,
) -> None:
    """Sends tensors from rank `owner` of a group to the others, which append them to `tensors`."""
    if group.size() == 1:
        return
    if owner != group.rank():
        tensors += [(name, _empty(shape, like)) for name, shape in parts]
    for _name, tensor in tensors:
        dist.broadcast(tensor, dist.get_global_rank(group, owner), group=group)


def _send_to_first(
    parts: Sequence[Part],
    tensors: list[tuple[str, Tensor]],
    like: Tensor,
    group: dist.ProcessGroup,
    owner: int,
) -> None:
    """Sends tensors from rank `owner` of a group to its first one, which appends them to `tensors`."""
    if owner == 0:
        return
    if group.rank() == owner:
        for _name, tensor in tensors:
            dist.send(tensor, dist.get_global_rank(group, 0), group)
    if group.rank() == 0:
        for name, shape in parts:
            tensor = _empty(shape, like)
            dist.recv(tensor, dist.get_global_rank(group, owner), group)
            tensors.append((name, tensor))


def _empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A plain tensor, also where `like` is in FP8 and its own `new_empty` is not."""
    return torch.empty(shape, dtype=like.dtype, device=like.device)
