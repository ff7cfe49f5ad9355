"""The policy that a KL term holds the trained one to: frozen, or renewed every few steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_parallel_r1.model.gpt import Model
from megatron_parallel_r1.train.logprob_runner import Scorer
from megatron_parallel_r1.train.micro_batch import MicroBatch


class Reference:
    """A second model, of the trained one's shape and split.

    Args:
        model: with the weights that the stage began with.
        temperature: as the trainer's.
        every: after so many steps it takes the trained weights; 0: never.
    """

    def __init__(self, model: Model, temperature: float, every: int = 0) -> None:
        self.model = model.requires_grad_(False)
        self._scorer = Scorer(model, temperature)
        self._every = every

    def score(self, batches: Sequence[MicroBatch]) -> None:
        """Gives each micro-batch the value `reference`, on the last pipeline stage."""
        for batch, logprobs_N in zip(batches, self._scorer.logprobs(batches), strict=False):
            batch.values["reference"] = logprobs_N

    def born(self, step: int) -> int:
        """The step whose weights it has after `step`; 0: those that the stage began with."""
        return step - step % self._every if self._every else 0

    @torch.no_grad()
    def renew(self, trained: Model) -> None:
        """Takes the trained weights."""
        for own, new in zip(self.model.parameters(), trained.parameters(), strict=True):
            own.copy_(new)
