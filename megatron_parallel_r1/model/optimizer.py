"""Megatron's data-parallel wrapper and its Adam for a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.model.gpt import Model


@dataclass(frozen=True, slots=True)
class Adam:
    """AdamW (arXiv 1711.05101). Norms have no weight decay; `clip` bounds the gradient norm, 0 is off.

    `sharded` splits its state over the data-parallel ranks (Megatron's distributed optimizer).
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    sharded: bool = False


def wrap_for_training(model: Model, adam: Adam) -> tuple[list[DistributedDataParallel], MegatronOptimizer]:
    """Wraps each stage for gradient accumulation in float32 and creates their optimizer.

    A step is `zero_grad_buffer()` of each stage, `optimizer.zero_grad()`, Megatron's
    `get_forward_backward_func()`, whose loss function returns the loss summed over its tokens, their number
    (int32) and a dict to report, and `optimizer.step()`. The pipeline schedule calls `finalize_model_grads`,
    which divides by the tokens of all micro-batches and ranks. A learning-rate schedule sets `group["lr"]` of
    `optimizer.param_groups`.

    Raises:
        UserError: matrices are stored in FP8, and the optimizer's state is not sharded.
    """
    config = model.config
    if config.fp8_param and not adam.sharded:
        raise UserError("model.fp8_params: FP8 parameters need parallel.sharded_optimizer; set it to true")
    reduction = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=adam.sharded,
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
        # torch's Adam is fused by default on a GPU only.
        if not torch.cuda.is_available():
            group["fused"] = True
    config.finalize_model_grads_func = finalize_model_grads
    syncs = [stage.no_sync for stage in wrapped]
    config.no_sync_func = syncs if len(syncs) > 1 else syncs[0]
    config.grad_scale_func = optimizer.scale_loss
    return wrapped, optimizer
