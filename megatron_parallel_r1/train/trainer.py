"""The harness around Megatron: micro-batches in, one optimizer step or log-probs out.

Shapes: L tokens of a row, N targets of a micro-batch, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_parallel_r1.model.gpt import PathGPT
from megatron_parallel_r1.model.optimizer import Adam, trainable
from megatron_parallel_r1.train.logprobs import bar, entropies, target_logprobs
from megatron_parallel_r1.train.microbatch import MicroBatch

# From log-probs of the targets and their micro-batch: the loss summed over targets, and sums to report.
Loss = Callable[[torch.Tensor, MicroBatch], tuple[torch.Tensor, dict[str, torch.Tensor]]]


@dataclass(frozen=True, slots=True)
class Update:
    """What one optimizer step did.

    Attributes:
        loss, entropy: means over all targets (entropy in nats).
        grad_norm: of the whole gradient before clipping.
        targets: tokens with loss, over all processes.
        means: of what the loss reported, per target.
        logprobs: of the targets before the update, one vector a micro-batch of this process; on the last
            pipeline stage only.
    """

    loss: float
    entropy: float
    grad_norm: float
    targets: int
    means: dict[str, float]
    logprobs: list[torch.Tensor]


@dataclass(frozen=True, slots=True)
class Schedule:
    """Learning rate over the steps of a stage: linear warm-up, then constant or down to `final` x peak."""

    peak: float
    warmup: int = 0
    final: float = 1.0

    def at(self, step: int, steps: int) -> float:
        """Of step 1..steps."""
        if step <= self.warmup:
            return self.peak * step / self.warmup
        passed = (step - self.warmup) / max(1, steps - self.warmup)
        return self.peak * (1 + (self.final - 1) * passed)


class Trainer:
    """A model, its optimizer, and the two things that are done with them.

    Args:
        model: its weights set.
        adam: the optimizer's settings; the rate of each step is given with it.
        temperature: by which logits are divided, as the rollout's.
    """

    def __init__(self, model: PathGPT, adam: Adam, temperature: float = 1.0) -> None:
        self.model = model
        self.wrapped, self.optimizer = trainable(model, adam)
        self.temperature = temperature

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def logprobs(self, batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
        """Log-probs of the targets of each micro-batch under the present weights, float32 [N]."""
        with torch.no_grad():
            return self._run(batches, self._only_logprobs, forward_only=True)

    def update(self, batches: Sequence[MicroBatch], loss: Loss, lr: float) -> Update:
        """One optimizer step on the mean loss over all targets of `batches`.

        Raises:
            FloatingPointError: loss or gradient is not finite; the weights are then of no more use.
        """
        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        reports = self._run(batches, partial(self._with_loss, loss), forward_only=False)
        sums = _total([report for report, _ in reports], self.device)
        if not math.isfinite(sums["loss"]):
            raise FloatingPointError(f"the loss is {sums['loss']}")
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        _, grad_norm, _ = self.optimizer.step()
        if not math.isfinite(grad_norm):
            raise FloatingPointError(f"the gradient norm is {grad_norm}")
        targets = sums.pop("targets")
        means = {name: value / max(1.0, targets) for name, value in sums.items()}
        return Update(
            loss=means.pop("loss"),
            entropy=means.pop("entropy"),
            grad_norm=float(grad_norm),
            targets=int(targets),
            means=means,
            logprobs=[logprobs_N for _, logprobs_N in reports],
        )

    def _run(self, batches: Sequence[MicroBatch], head: Callable[..., Any], forward_only: bool) -> list[Any]:
        """Megatron's schedule over the micro-batches; what `head` returned for each."""

        def forward(batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
            batch = next(batches)
            logits_1LV = model(batch.tokens_1L, batch.positions_1L, batch.layout_KL)
            return logits_1LV, partial(head, batch)

        return get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(batches),
            model=[self.wrapped],
            num_microbatches=len(batches),
            seq_length=max(batch.tokens_1L.shape[1] for batch in batches),
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    def _target_logits(self, batch: MicroBatch, logits_1LV: torch.Tensor) -> torch.Tensor:
        return bar(logits_1LV[0, batch.at_N].float() / self.temperature, batch.barred_N)

    def _only_logprobs(
        self, batch: MicroBatch, logits_1LV: torch.Tensor, non_loss_data: bool = False
    ) -> torch.Tensor:
        return target_logprobs(self._target_logits(batch, logits_1LV), batch.labels_N)

    def _with_loss(
        self, loss: Loss, batch: MicroBatch, logits_1LV: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """Loss sum, number of targets (Megatron divides the gradient by their total), and the report."""
        logits_NV = self._target_logits(batch, logits_1LV)
        entropy = entropies(logits_NV.detach()).sum()
        logprobs_N = target_logprobs(logits_NV, batch.labels_N)
        loss_sum, sums = loss(logprobs_N, batch)
        targets = torch.tensor(len(logprobs_N), dtype=torch.int32, device=logprobs_N.device)
        report = {"loss": loss_sum.detach(), "entropy": entropy, "targets": targets, **sums}
        return loss_sum, targets, (report, logprobs_N.detach())


def _total(reports: Sequence[dict[str, torch.Tensor]], device: torch.device) -> dict[str, float]:
    """Sums over micro-batches and data-parallel processes; the last pipeline stage tells the others."""
    names: list[str] = sorted(reports[0]) if reports else []
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    if pipeline.size() > 1:
        told = [names]
        dist.broadcast_object_list(
            told, parallel_state.get_pipeline_model_parallel_last_rank(), group=pipeline
        )
        names = told[0]
    sums = torch.zeros(len(names), dtype=torch.float64, device=device)
    for report in reports:
        sums += torch.stack([report[name].double() for name in names])
    if reports:
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    if pipeline.size() > 1:
        dist.broadcast(sums, parallel_state.get_pipeline_model_parallel_last_rank(), group=pipeline)
    return dict(zip(names, sums.tolist(), strict=True))
