"""The loss that balances the load of experts: its value, and what it does to a router."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_parallel_r1.model.experts import balance_loss
from megatron_parallel_r1.model.gpt import build_model
from megatron_parallel_r1.model.layers import Layers
from megatron_parallel_r1.model.weights import load_hf_tensors, random_hf_tensors
from megatron_parallel_r1.thought.layout import lay_out
from megatron_parallel_r1.thought.tree import Tree
from megatron_parallel_r1.train.micro_batch import BatchPartition, MicroBatch, partition_rows
from megatron_parallel_r1.train.trainer import Adam, Trainer
from tests.unit.train.test_routing import SHAPE

RELATIVE = 1e-5  # float32 sums in another order


def loss_of(scores: list[list[float]], chosen: list[list[int]], segments: Sequence[int]) -> float:
    chosen_LE = torch.zeros(len(scores), len(scores[0]), dtype=torch.bool)
    chosen_LE.scatter_(1, torch.tensor(chosen), True)
    group = dist.group.WORLD
    assert group is not None
    return float(balance_loss(torch.tensor(scores), chosen_LE, torch.tensor(segments), group))


def test_values_computed_by_hand() -> None:
    even = [[0.5, 0.5], [0.5, 0.5]]
    assert loss_of(even, [[0], [1]], [0, 0]) == 2.0  # 1 a target
    # Trace 0 has 2 targets, both at expert 0: 2 / 1 x (2/2 x (0.75 + 0.5)). Trace 1: 2 / 1 x (1/1 x 0.25).
    scores = [[0.75, 0.25], [0.5, 0.5], [0.25, 0.75], [0.9, 0.1]]
    assert loss_of(scores, [[0], [0], [0], [1]], [0, 0, 1, -1]) == 2 * 1.25 + 2 * 0.25
    # Three experts, two a token: 3 / 2 x (2/2 x (0.6 + 0.2) + 1/2 x (0.3 + 0.3) + 1/2 x (0.1 + 0.5)).
    scores = [[0.6, 0.3, 0.1], [0.2, 0.3, 0.5]]
    assert abs(loss_of(scores, [[0, 1], [0, 2]], [0, 0]) - 1.5 * (0.8 + 0.3 + 0.3)) < 1e-6


def trained(capacity: int, steps: int, balance: float) -> tuple[list[float], list[torch.Tensor], float]:
    """Trains on the balance loss alone; returns gradient norms, routers, and the largest load of an expert,
    as a multiple of the mean."""
    model = build_model(SHAPE, layers=Layers(balance_loss=balance))
    load_hf_tensors(model, random_hf_tensors(SHAPE, seed=3, std=0.2))
    trainer = Trainer(model, Adam(lr=1e-2, eps=1e-6, clip=0.0))
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(40, (n,), generator=generator).tolist() for n in (9, 24, 17, 40)]
    rows = [lay_out(t[:2], t[2:], [True] * (len(t) - 2), Tree(len(t) - 2, ()), "causal") for t in texts]
    batches = [MicroBatch.of(row, trainer.device) for row in partition_rows(rows, capacity, BatchPartition())]

    def nothing(
        logprobs_N: torch.Tensor, entropies_N: torch.Tensor, batch: MicroBatch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return 0.0 * logprobs_N.sum(), {}

    norms = [trainer.update(batches, nothing, 1e-2).grad_norm for _ in range(steps)]
    routers = [layer.mlp.router for layer in model[0].decoder.layers]
    loads: list[torch.Tensor] = []

    def count(router: torch.nn.Module, tokens: object, routed: tuple[torch.Tensor, torch.Tensor]) -> None:
        loads.append(routed[1].sum(0))

    for router in routers:
        router.register_forward_hook(count)
    trainer.logprobs(batches)
    load_XE = torch.stack(loads).view(-1, len(routers), SHAPE.experts.count).sum(0).float()
    largest = float((load_XE.max(1)[0] / load_XE.mean(1)).mean())
    return norms, [router.weight.detach().clone() for router in routers], largest


def test_it_balances_and_packing_changes_nothing() -> None:
    together, packed, even = trained(capacity=100, steps=40, balance=0.1)
    alone, single, _ = trained(capacity=10, steps=40, balance=0.1)
    *_, uneven = trained(capacity=100, steps=1, balance=0.0)
    print(f"largest load of an expert: {uneven:.2f} before, {even:.2f} after, times the mean")
    assert abs(together[0] - alone[0]) <= RELATIVE * alone[0] and together[0] > 0
    for ours, theirs in zip(packed, single, strict=True):
        assert float((ours - theirs).norm()) <= 100 * RELATIVE * float(theirs.norm())
    assert even < 0.7 * uneven
