"""The ranks that share one engine: each holds a shard of every weight, and all decode the same rows.

They run the same loop over the same requests, in lockstep, and communicate in every pass.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_parallel_r1.architecture.families import EMBEDDING, FAMILIES, HEAD


@dataclass(frozen=True, slots=True)
class TensorParallelGroup:
    """This process's place in its tensor-parallel group; `group` is None for a process alone."""

    rank: int
    size: int
    group: dist.ProcessGroup | None

    @classmethod
    def alone(cls) -> TensorParallelGroup:
        return cls(0, 1, None)

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> TensorParallelGroup:
        """All processes of a group that this process is in."""
        return cls(dist.get_rank(group), dist.get_world_size(group), group)

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' tensors; may be written into `part`."""
        if self.size > 1:
            dist.all_reduce(part, group=self.group)
        return part

    def gather_columns(self, part_NX: torch.Tensor) -> torch.Tensor:
        """On rank 0 all ranks' columns side by side, in order of rank; on other ranks their own."""
        if self.size == 1:
            return part_NX
        parts = [torch.empty_like(part_NX) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(part_NX, parts, dst=self._first(), group=self.group)
        return torch.cat(parts, dim=-1) if parts else part_NX

    def broadcast(self, values_XN: NDArray[np.float64], shape: tuple[int, int]) -> NDArray[np.float64]:
        """Rank 0's `values_XN`, of `shape`, on every rank (integers up to 2**53 stay exact)."""
        numbers = torch.empty(shape, dtype=torch.float64, device=self._device())
        if self.rank == 0:
            numbers.copy_(torch.from_numpy(values_XN))
        dist.broadcast(numbers, src=self._first(), group=self.group)
        return numbers.cpu().numpy()

    def assert_in_step(self, count: int, work: object, version: int = -1) -> int:
        """Checks that all ranks are about to do the same work; returns the lowest of their versions.

        Without it, ranks that diverged would wait for each other, or add up unrelated rows.

        Args:
            count: of requests; for the message.
            work: anything whose `repr` identifies the work.
            version: of the newest weights that this rank has.

        Raises:
            RuntimeError: on every rank, if they differ.
        """
        if self.size == 1:
            return version
        own = torch.tensor([count, zlib.crc32(repr(work).encode()), version], device=self._device())
        gathered = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(gathered, own, group=self.group)
        states = torch.stack(gathered).tolist()
        if any(state[:2] != states[0][:2] for state in states):
            counts = ", ".join(str(count) for count, _, _ in states)
            raise RuntimeError(
                f"native engine: the {self.size} processes of a tensor group diverged (requests: {counts}); "
                "prompts, settings and weights must be the same on all of them"
            )
        return min(version for _, _, version in states)

    def _first(self) -> int:
        assert self.group is not None
        return dist.get_global_rank(self.group, 0)

    def _device(self) -> torch.device:
        return torch.device("cuda" if "nccl" in dist.get_backend(self.group) else "cpu")


def _module(name: str) -> str:
    """The last module of a tensor's name: `q_proj` of `model.layers.0.self_attn.q_proj.weight`."""
    return name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]


# The dimension that is split, as in Megatron: rows where a weight produces heads, features or logits; columns
# where it reads them.
SHARD_DIM = {
    _module(name): template.split_dim
    for template in (EMBEDDING, HEAD, *(each for family in FAMILIES.values() for each in family.layer))
    for name, _ in template.hf
    if template.split_dim is not None
}


def local_shard(name: str, tensor: torch.Tensor, group: TensorParallelGroup) -> torch.Tensor:
    """A copy of this rank's shard of the tensor with that Hugging Face name; all of it if it is not split.

    Shards have equal sizes. Where they do not divide the tensor's, zeros fill the last: features that are
    always 0, and logits that `gather_columns`' caller drops. Heads must divide.
    """
    dim = SHARD_DIM.get(_module(name))
    if dim is None or group.size == 1:
        return tensor.detach().clone()
    whole = tensor.shape[dim]
    shape = list(tensor.shape)
    shape[dim] = -(-whole // group.size)
    start = min(group.rank * shape[dim], whole)
    count = min(shape[dim], whole - start)
    shard = tensor.new_zeros(shape)
    shard.narrow(dim, 0, count).copy_(tensor.detach().narrow(dim, start, count))
    return shard
