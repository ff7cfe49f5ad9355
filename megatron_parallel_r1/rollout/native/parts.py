"""Which part of a weight each process of a team keeps, in the manner of Megatron-LM (arXiv 1909.08053)."""

from __future__ import annotations

import torch

from megatron_parallel_r1.rollout.native.team import Team

# The dimension that is cut: rows where a weight makes heads, features or logits; columns where it reads them.
CUT = {
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


def own_part(name: str, tensor: torch.Tensor, team: Team) -> torch.Tensor:
    """A copy of this rank's part of the tensor of that Hugging Face name; all of it where nothing is cut.

    Parts have one size. Where it does not divide the tensor's, zeros fill the last: features that are always
    0, and logits that whoever gathers them cuts off. Heads must divide (limits.py).
    """
    cut = CUT.get(name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2])
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
