"""The processes that share one engine: each holds a part of every weight, and all decode the same rows.

They run the same loop over the same requests, in lockstep, and meet in every pass. Alone, nobody is asked.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class TensorParallelGroup:
    """This process's place in its team.

    Attributes:
        rank: of this process, 0..size-1.
        size: processes in the team.
        group: of those; None for a process alone.
    """

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
        """On rank 0 all ranks' columns side by side, in order of rank; elsewhere the rank's own."""
        if self.size == 1:
            return part_NX
        parts = [torch.empty_like(part_NX) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(part_NX, parts, dst=self._first(), group=self.group)
        return torch.cat(parts, dim=-1) if parts else part_NX

    def broadcast(self, told_XN: NDArray[np.float64], shape: tuple[int, int]) -> NDArray[np.float64]:
        """Rank 0's numbers (integers up to 2**53 stay exact), on every rank.

        Args:
            told_XN: what rank 0 says; other ranks' is not read.
            shape: of `told_XN` there.
        """
        numbers = torch.empty(shape, dtype=torch.float64, device=self._device())
        if self.rank == 0:
            numbers.copy_(torch.from_numpy(told_XN))
        dist.broadcast(numbers, src=self._first(), group=self.group)
        return numbers.cpu().numpy()

    def agree(self, count: int, work: object, version: int = -1) -> int:
        """Returns the least of all ranks' versions, if all are about to do the same work.

        Without it, ranks that ever parted ways would wait for each other, or add up unrelated rows.

        Args:
            count: of requests; for the message.
            work: anything whose `repr` tells it from other work.
            version: of the newest weights that this rank has.

        Raises:
            RuntimeError: on every rank, if they differ.
        """
        if self.size == 1:
            return version
        mine = torch.tensor([count, zlib.crc32(repr(work).encode()), version], device=self._device())
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyone, mine, group=self.group)
        said = torch.stack(everyone).tolist()
        if any(one[:2] != said[0][:2] for one in said):
            counts = ", ".join(str(count) for count, _, _ in said)
            raise RuntimeError(
                f"native engine: the {self.size} processes of a tensor group parted ways (requests: "
                f"{counts}); prompts, settings and weights must be the same on all of them"
            )
        return min(version for _, _, version in said)

    def _first(self) -> int:
        assert self.group is not None
        return dist.get_global_rank(self.group, 0)

    def _device(self) -> torch.device:
        return torch.device("cuda" if "nccl" in dist.get_backend(self.group) else "cpu")


# The dimension that is cut: rows where a weight makes heads, features or logits; columns where it reads them.
SHARD_DIM = {
    "embed_tokens": 0,
    "lm_head": 0,
    "q_proj": 0,
    "k_proj": 0,
    "v_proj": 0,
    "o_proj": 1,
    "gate_proj": 0,
    "up_proj": 0,
    "down_proj": 1,
}


def local_shard(name: str, tensor: torch.Tensor, team: TensorParallelGroup) -> torch.Tensor:
    """A copy of this rank's part of the tensor of that Hugging Face name; all of it where nothing is cut.

    Parts have one size. Where it does not divide the tensor's, zeros fill the last: features that are always
    0, and logits that whoever gathers them cuts off. Heads must divide (limits.py).
    """
    cut = SHARD_DIM.get(name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2])
    if cut is None or team.size == 1:
        return tensor.detach().clone()
    whole = tensor.shape[cut]
    shape = list(tensor.shape)
    shape[cut] = -(-whole // team.size)
    start = min(team.rank * shape[cut], whole)
    count = min(shape[cut], whole - start)
    part = tensor.new_zeros(shape)
    part.narrow(cut, 0, count).copy_(tensor.detach().narrow(cut, start, count))
    return part
