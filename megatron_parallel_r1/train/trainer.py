"""One optimizer step from micro-batches and a loss.

Shapes: T tokens of a row on this process, N targets of a micro-batch, E hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from megatron_parallel_r1.distributed.collectives import sum_metrics
from megatron_parallel_r1.model.gpt import Model
from megatron_parallel_r1.model.optimizer import Adam, wrap_for_training
from megatron_parallel_r1.train.logprob_runner import LogprobRunner
from megatron_parallel_r1.train.micro_batch import MicroBatch

# Takes log-probs and entropies of the targets and their micro-batch; returns the loss summed over targets,
# and sums to report.
Loss = Callable[[torch.Tensor, torch.Tensor, MicroBatch], tuple[torch.Tensor, dict[str, torch.Tensor]]]


class NotFinite(ArithmeticError):
    """The loss or gradient of an update is not finite; the update was not made."""


@dataclass(frozen=True, slots=True)
class Update:
    """The result of one optimizer step.

    Attributes:
        loss, entropy: means over all targets (entropy in nats).
        grad_norm: norm of the whole gradient before clipping.
        targets: number of targets over all ranks.
        means: means per target of the sums that the loss reported.
        logprobs: log-probs before the update, one vector per micro-batch of this rank; on the last pipeline
            stage only.
    """

    loss: float
    entropy: float
    grad_norm: float
    targets: int
    means: dict[str, float]
    logprobs: list[torch.Tensor]


@dataclass(frozen=True, slots=True)
class LrSchedule:
    """Learning rate over a stage: linear warm-up, then linear from `peak` to `final` x `peak`."""

    peak: float
    warmup: int = 0
    final: float = 1.0

    def at(self, step: int, steps: int) -> float:
        """The learning rate of a step in 1..steps."""
        if step <= self.warmup:
            return self.peak * step / self.warmup
        passed = (step - self.warmup) / max(1, steps - self.warmup)
        return self.peak * (1 + (self.final - 1) * passed)


class Trainer(LogprobRunner):
    """Trains a model and computes log-probs under its current weights.

    Args:
        model: with its weights loaded.
        adam: settings of the optimizer; each update gets its own learning rate.
        temperature: divisor of the logits; the rollout's.
    """

    def __init__(self, model: Model, adam: Adam, temperature: float = 1.0) -> None:
        super().__init__(model, temperature)
        self.wrapped, self.optimizer = wrap_for_training(model, adam)
        self._stages = list(self.wrapped)

    def update(self, batches: Sequence[MicroBatch], loss: Loss, lr: float) -> Update:
        """Makes one optimizer step on the mean loss over all targets of `batches`.

        Raises:
            NotFinite: loss or gradient is not finite; weights and optimizer are unchanged.
        """
        for stage in self.wrapped:
            stage.zero_grad_buffer()
        self.optimizer.zero_grad()
        reports = self._run(batches, partial(self._with_loss, loss), forward_only=False)
        sums = sum_metrics([report for report, _ in reports], self.device)
        targets = sums.pop("targets")
        means = {name: value / max(1.0, targets) for name, value in sums.items()}
        if not math.isfinite(means["loss"]):
            raise NotFinite(f"the loss is {means['loss']}")
        # Check before the step, which would spread it over all weights.
        self.optimizer.prepare_grads()
        if not math.isfinite(norm := float(self.optimizer.get_grad_norm())):
            raise NotFinite(f"the gradient norm is {norm}")
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        _, grad_norm, _ = self.optimizer.step()
        return Update(
            loss=means.pop("loss"),
            entropy=means.pop("entropy"),
            grad_norm=float(grad_norm),
            targets=int(targets),
            means=means,
            logprobs=[logprobs_N for _, logprobs_N in reports],
        )

    def _with_loss(
        self, loss: Loss, batch: MicroBatch, hidden_T1E: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """The loss sum, the number of targets (Megatron divides the gradient by its total), the report."""
        logprobs_N, entropies_N = self._scores(batch, hidden_T1E)
        loss_sum, sums = loss(logprobs_N, entropies_N, batch)
        targets = torch.tensor(len(logprobs_N), dtype=torch.int32, device=logprobs_N.device)
        entropy = entropies_N.detach().sum()
        report = {"loss": loss_sum.detach(), "entropy": entropy, "targets": targets, **sums}
        return loss_sum, targets, (report, logprobs_N.detach())
