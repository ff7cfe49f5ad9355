"""Backward that gathers keys and values again: what is stored meanwhile, and the same gradients."""

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_parallel_r1.model import spec
from megatron_parallel_r1.model.attention.dispatch import path_attention

LENGTH, SIZE = 12, 3


def gather(part_QGD: torch.Tensor) -> torch.Tensor:
    """As if this rank had the first part of a row of SIZE parts, each half the one before."""
    return torch.cat([part_QGD * 0.5**rank for rank in range(SIZE)])


def gradients(again: bool) -> tuple[list[torch.Tensor], bool]:
    """Gradients of query, key and value; and whether the whole row was there after the forward pass."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(LENGTH, 2, 16, generator=generator).requires_grad_() for _ in range(3))
    whole = gather(key), gather(value)
    index_Q = torch.arange(LENGTH) + LENGTH * (SIZE - 1)
    layout_2Q = torch.stack([index_Q, torch.zeros_like(index_Q)]).int()
    watched = [StorageWeakRef(tensor.untyped_storage()) for tensor in whole]
    if again:
        with spec._stored_as_parts(whole, (key, value)):
            out_QHD = path_attention(query, *whole, layout_2Q, 0.25, "sdpa")
    else:
        out_QHD = path_attention(query, *whole, layout_2Q, 0.25, "sdpa")
    del whole
    stored = not all(storage.expired() for storage in watched)
    out_QHD.square().sum().backward()
    return [tensor.grad for tensor in (query, key, value)], stored


def test_only_this_ranks_part_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec, "_gather_row", gather)
    plain, stored = gradients(again=False)
    again, stored_again = gradients(again=True)
    assert stored and not stored_again
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, plain, strict=True))
