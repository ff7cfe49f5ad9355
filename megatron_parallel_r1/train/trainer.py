"""One optimizer step from micro-batches and a loss, by Megatron's data-parallel wrapper and its Adam.

Shapes: T tokens of a row on this process, N targets of a micro-batch, E hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import MegatronOptimizer

from megatron_parallel_r1.distributed.collectives import sum_metrics
from megatron_parallel_r1.distributed.stragglers import PassTimer
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.model.experts import with_traces
from megatron_parallel_r1.model.gpt import Model
from megatron_parallel_r1.train.logprob_runner import LogprobRunner
from megatron_parallel_r1.train.micro_batch import MicroBatch
from megatron_parallel_r1.train.offload import TrainerMemory
from megatron_parallel_r1.utils.devices import to_device

# Takes log-probs and entropies of the targets and their micro-batch; returns the loss summed over targets,
# and sums to report.
Loss = Callable[[torch.Tensor, torch.Tensor, MicroBatch], tuple[torch.Tensor, dict[str, torch.Tensor]]]


# Gradients of a bucket, in numbers; None: Megatron's choice, 40 million or more.
BUCKET_ELEMENTS: int | None = None


class NotFinite(ArithmeticError):
    """The loss or gradient of an update is not finite; the update was not made."""


@dataclass(frozen=True, slots=True)
class Update:
    """The result of one optimizer step.

    Attributes:
        loss, entropy: means over all targets (entropy in nats).
        grad_norm: of the whole gradient before clipping.
        targets: their number over all ranks.
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


@dataclass(frozen=True, slots=True)
class Adam:
    """AdamW (arXiv 1711.05101). Norms have no weight decay; `clip` bounds the gradient norm, 0 is off.

    `sharded` splits its state over the data-parallel ranks (Megatron's distributed optimizer). With `overlap`
    gradients are summed over them in buckets while backward still runs; None: on GPUs.
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    sharded: bool = False
    overlap: bool | None = None


def wrap_for_training(
    model: Model, adam: Adam, timer: PassTimer | None = None
) -> tuple[list[DistributedDataParallel], MegatronOptimizer]:
    """Wraps each stage for gradient accumulation in float32 and creates their optimizer.

    A step is `zero_grad_buffer()` of each stage, `optimizer.zero_grad()`, Megatron's
    `get_forward_backward_func()`, whose loss function returns the loss summed over its tokens, their number
    (int32) and a dict to report, and `optimizer.step()`. The pipeline schedule calls `finalize_model_grads`,
    which divides by the tokens of all micro-batches and ranks. A learning-rate schedule sets `group["lr"]` of
    `optimizer.param_groups`.

    Args:
        timer: its pass ends where the reduction of the gradients begins.

    Raises:
        UserError: matrices are stored in FP8, and the optimizer's state is not sharded.
    """
    config = model.config
    if config.fp8_param and not adam.sharded:
        raise UserError("model.fp8_params: FP8 parameters need parallel.sharded_optimizer; set it to true")
    reduction = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=adam.sharded,
        overlap_grad_reduce=torch.cuda.is_available() if adam.overlap is None else adam.overlap,
        bucket_size=BUCKET_ELEMENTS,
        fp8_param_gather=config.fp8_param,
    )
    wrapped = [DistributedDataParallel(config, reduction, stage) for stage in model]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=adam.lr,
            min_lr=0.0,
            weight_decay=adam.weight_decay,
            adam_beta1=adam.betas[0],
            adam_beta2=adam.betas[1],
            adam_eps=adam.eps,
            clip_grad=adam.clip,
            bf16=config.params_dtype == torch.bfloat16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=adam.sharded,
            fp8_recipe=config.fp8_recipe if config.fp8 else None,
        ),
        wrapped,
    )
    # Megatron marks norms with wd_mult = 0, but only its own scheduler would ever multiply by it.
    for group in optimizer.param_groups:
        group["weight_decay"] = adam.weight_decay * group["wd_mult"]
        # torch's Adam, where neither Transformer Engine nor Apex is installed: by default it goes tensor by
        # tensor on a CPU, and on a GPU makes copies of all of them.
        if "fused" in group:
            group["fused"] = True
    config.finalize_model_grads_func = partial(_finalize_gradients, timer)
    syncs = [stage.no_sync for stage in wrapped]
    config.no_sync_func = syncs if len(syncs) > 1 else syncs[0]
    config.grad_scale_func = optimizer.scale_loss
    return wrapped, optimizer


def _finalize_gradients(
    timer: PassTimer | None, model: list[DistributedDataParallel], targets: torch.Tensor, **options: Any
) -> None:
    """Reduces the gradients by Megatron's function and divides them by the number of targets of all ranks.

    Megatron's own division first asks whether the number is positive, and the host would wait for the answer.
    """
    if timer is not None:
        timer.end()
    finalize_model_grads(model, None, **options)
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast(targets, last, group=parallel_state.get_pipeline_model_parallel_group())
    dist.all_reduce(targets, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    for stage in model:
        stage.scale_gradients(1.0 / targets.clamp(min=1))


def _clip(optimizer: MegatronOptimizer, grad_norm: float) -> None:
    """Scales the gradients of all parts of a chained optimizer down to the largest norm allowed."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.config.clip_grad > 0 and (parameters := part.get_parameters()):
            clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, grad_norm)


class Trainer(LogprobRunner):
    """Trains a model and computes log-probs under its current weights.

    Arguments as for `LogprobRunner`; each update gets its own learning rate.

    Attributes:
        optimizer_steps: those that were begun. Adam's own count is on the device, and reading it would wait.
        passes: times the forward and backward passes of updates.
        memory: takes gradients and optimizer off the device; log-probs need neither.
    """

    def __init__(self, model: Model, adam: Adam, temperature: float = 1.0) -> None:
        super().__init__(model, temperature)
        self.passes = PassTimer(self.device)
        self.wrapped, self.optimizer = wrap_for_training(model, adam, self.passes)
        self.optimizer_steps = 0
        self.memory = TrainerMemory(self.wrapped, self.optimizer)
        self._stages = list(self.wrapped)

    def update(self, batches: Sequence[MicroBatch], loss: Loss, lr: float) -> Update:
        """Makes one optimizer step on the mean loss over all targets of `batches`.

        Raises:
            NotFinite: loss or gradient is not finite; weights and optimizer are unchanged.
        """
        for stage in self.wrapped:
            stage.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.passes.begin()
        reports = self._run(batches, partial(self._with_loss, loss), forward_only=False)
        sums = sum_metrics([report for report, _ in reports], self.device)
        targets = sums.pop("targets")
        means = {name: value / max(1.0, targets) for name, value in sums.items()}
        if not math.isfinite(means["loss"]):
            raise NotFinite(f"the loss is {means['loss']}")
        # The parts of the optimizer's own step, which would spread a norm that is not finite over weights.
        self.optimizer.prepare_grads()
        if not math.isfinite(grad_norm := float(self.optimizer.get_grad_norm())):
            raise NotFinite(f"the gradient norm is {grad_norm}")
        _clip(self.optimizer, grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer_steps += 1
        self.optimizer.step_with_ready_grads()
        return Update(
            loss=means.pop("loss"),
            entropy=means.pop("entropy"),
            grad_norm=grad_norm,
            targets=int(targets),
            means=means,
            logprobs=[logprobs_N for _, logprobs_N in reports],
        )

    def _routing(self, batch: MicroBatch) -> torch.Tensor | None:
        """Overrides LogprobRunner's: the policy's tokens go through the experts that the engine chose."""
        config = self.model.config
        if not config.moe_aux_loss_coeff:
            return batch.experts_LXC
        segment_L = to_device(batch.row.segment_L, self.device)
        return with_traces(batch.experts_LXC, segment_L, config.moe_router_topk)

    def _with_loss(
        self, loss: Loss, batch: MicroBatch, hidden_T1E: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """The loss sum, the number of targets (Megatron divides the gradient by its total), the report."""
        logprobs_N, entropies_N = self._scores(batch, hidden_T1E)
        loss_sum, sums = loss(logprobs_N, entropies_N, batch)
        targets = torch.full((), len(logprobs_N), dtype=torch.int32, device=logprobs_N.device)
        entropy = entropies_N.detach().sum()
        report = {"loss": loss_sum.detach(), "entropy": entropy, "targets": targets, **sums}
        return loss_sum, targets, (report, logprobs_N.detach())
