"""An update whose loss or gradient is not finite is refused before it touches weights or optimizer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron_parallel_r1.model.weights import hf_tensors
from megatron_parallel_r1.thought.layout import lay_out
from megatron_parallel_r1.thought.tree import Tree
from megatron_parallel_r1.train.micro_batch import MicroBatch, partition_rows
from megatron_parallel_r1.train.trainer import Loss, NotFinite, Trainer

TOKENS = (9, 12, 31, 10, 17, 22)


def likelihood(logprobs_N: torch.Tensor, *_: object) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return -logprobs_N.sum(), {}


def no_number(logprobs_N: torch.Tensor, *_: object) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return (logprobs_N * torch.nan).sum(), {}


def no_slope(logprobs_N: torch.Tensor, *_: object) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The root of 0: a loss of 0, with a gradient that is none."""
    return (logprobs_N - logprobs_N.detach()).abs().sqrt().sum(), {}


def updated(trainer: Trainer, loss: Loss) -> None:
    row = lay_out(TOKENS[:1], TOKENS[1:], [True] * 5, Tree(5), "causal")
    batches = [
        MicroBatch.of(packed, trainer.device) for packed in partition_rows([row], 64, trainer.partition)
    ]
    trainer.update(batches, loss, lr=1e-2)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in hf_tensors(trainer.model)}


@pytest.mark.parametrize(("loss", "message"), [(no_number, "the loss is nan"), (no_slope, "gradient norm")])
def test_a_bad_update_leaves_no_trace(trainer_of: Callable[..., Trainer], loss: Loss, message: str) -> None:
    """Good, bad, good ends bit for bit as good, good: Adam's moments and its count of steps are untouched."""
    disturbed, quiet = trainer_of(), trainer_of()
    for trainer in (disturbed, quiet):
        updated(trainer, likelihood)
    before = weights(disturbed)
    with pytest.raises(NotFinite, match=message):
        updated(disturbed, loss)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(disturbed).items())
    for trainer in (disturbed, quiet):
        updated(trainer, likelihood)
    after, expected = weights(disturbed), weights(quiet)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in after.items())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in after.items())
