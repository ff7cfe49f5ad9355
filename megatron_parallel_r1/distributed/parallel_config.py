"""Sizes of the parallel groups, and checks that a model can be split that way. Imports no torch."""

from __future__ import annotations

from math import lcm
from typing import Literal

from pydantic import model_validator

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.utils.settings import Count, Ranks, Settings


class ParallelConfig(Settings):
    """Sizes of the parallel groups; the rest of the world is data parallel."""

    tensor: Ranks = 1
    """Tensor-parallel size."""
    pipeline: Ranks = 1
    """Pipeline-parallel size."""
    first_stage_layers: Count | None = None
    """Layers of the first pipeline rank, which also embeds; null: as many as the others."""
    last_stage_layers: Count | None = None
    """Layers of the last pipeline rank, which also computes the logits; null: as many as the others."""
    virtual: Count = 1
    """Stages of each pipeline rank; 2 or more are interleaved (arXiv 2104.04473), which shortens the
    pipeline's idle time."""
    context: Ranks = 1
    """Context-parallel size; the group splits each row."""
    gather_again: bool = False
    """With `context`, backward gathers the keys and values of a row again instead of storing all of them on
    every rank; the attention kernel `tiled` stores copies all the same."""
    expert: Ranks = 1
    """Expert-parallel size: the experts of each layer are distributed, whole, over as many ranks, across the
    tensor-, context- and data-parallel groups. With 1, `tensor` splits each expert."""
    sequence: bool = False
    """Split norms and residuals along the tokens within a tensor-parallel group (sequence parallel)."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What backward recomputes instead of storing it: `full`: each layer from its input; `selective`: the
    inside of the MLP, or of the mixture of experts with its router (attention stores no scores in any
    case)."""
    sharded_optimizer: bool = False
    """Shard Adam's state over the data-parallel ranks (Megatron's distributed optimizer) instead of
    replicating it."""
    overlap_gradients: bool | None = None
    """Sum gradients over the data-parallel ranks in buckets while backward still runs; null: on GPUs."""

    @model_validator(mode="after")
    def _check_sizes(self) -> ParallelConfig:
        if self.virtual > 1 and self.pipeline == 1:
            raise ValueError(
                f"virtual {self.virtual} interleaves the stages of a pipeline, and pipeline is 1; "
                "set pipeline to 2 or more, or virtual to 1"
            )
        if self.uneven and (self.pipeline == 1 or self.virtual > 1):
            raise ValueError(
                "first_stage_layers, last_stage_layers: they need a pipeline of 2 or more, and virtual 1"
            )
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence needs a tensor size of 2 or more")
        return self

    @property
    def uneven(self) -> bool:
        """Whether the first or last pipeline rank has a number of layers of its own."""
        return self.first_stage_layers is not None or self.last_stage_layers is not None

    def stage_layers(self, layers: int) -> list[int]:
        """Returns the number of layers of each pipeline rank, of a model with `layers` layers.

        Raises:
            ValueError: they cannot be distributed so.
        """
        ends = {0: self.first_stage_layers, self.pipeline - 1: self.last_stage_layers}
        fixed = {rank: count for rank, count in ends.items() if count is not None}
        left, ranks = layers - sum(fixed.values()), self.pipeline - len(fixed)
        if left < 0 or (left > 0) != (ranks > 0) or (ranks and left % (ranks * self.virtual)):
            raise ValueError(f"{left} layers for {ranks} ranks")
        return [fixed.get(rank, left // max(1, ranks)) for rank in range(self.pipeline)]

    @property
    def expert_split(self) -> int:
        """Ranks that split the matrices of an expert (Megatron's expert tensor parallel size)."""
        return 1 if self.expert > 1 else self.tensor

    @property
    def replica_size(self) -> int:
        """Ranks that hold one replica of the model."""
        return self.tensor * self.pipeline * self.context

    @property
    def smallest_world(self) -> int:
        """Ranks of the smallest launch: whole replicas, and whole sets of experts."""
        return lcm(self.replica_size, self.pipeline * self.expert * self.expert_split)

    @property
    def row_multiple(self) -> int:
        """Rows are padded to a multiple of this number of tokens, so that each rank has equal parts."""
        return (2 * self.context if self.context > 1 else 1) * (self.tensor if self.sequence else 1)


def check_parallel(
    model: ModelConfig,
    parallel: ParallelConfig,
    world_size: int,
    max_tokens_per_micro_batch: int | None = None,
) -> None:
    """Checks that `world_size` ranks can split the model this way; needs no process group.

    Args:
        max_tokens_per_micro_batch: capacity of a packed row, if there is one.

    Raises:
        UserError: something does not divide; the message names the setting and a value that does.
    """
    tensor, stages = parallel.tensor, parallel.pipeline * parallel.virtual
    _check_experts(model, parallel)
    sizes = {"heads": model.heads, "kv_heads": model.kv_heads}
    if parallel.expert == 1:
        sizes["ffn"] = model.experts.ffn if model.experts else model.ffn
    for name, size in sizes.items():
        if size % tensor:
            raise UserError(
                f"parallel: tensor {tensor} does not divide the model's {name} {size}; "
                f"set tensor to {_divisor(tensor, *sizes.values())}"
            )
    if model.experts and tensor > 1 and not parallel.sequence:
        raise UserError(
            f"parallel: with tensor {tensor} Megatron trains experts only with sequence; set sequence: true"
        )
    _check_stages(model, parallel)
    if model.layers % stages and not parallel.uneven:
        raise UserError(
            f"parallel: {model.layers} layers cannot be cut into pipeline {parallel.pipeline} x virtual "
            f"{parallel.virtual} = {stages} equal stages; set pipeline to {_divisor(stages, model.layers)}"
            + (" and virtual to 1" if parallel.virtual > 1 else "")
        )
    check_world(parallel, world_size)
    if max_tokens_per_micro_batch is not None and max_tokens_per_micro_batch % parallel.row_multiple:
        more = max_tokens_per_micro_batch + -max_tokens_per_micro_batch % parallel.row_multiple
        raise UserError(
            f"max_tokens_per_micro_batch: {max_tokens_per_micro_batch} is no multiple of "
            f"{parallel.row_multiple}, which context "
            f"{parallel.context}{f' and sequence over tensor {tensor}' if parallel.sequence else ''} need to "
            f"split a row; set it to {more}"
        )


def _check_stages(model: ModelConfig, parallel: ParallelConfig) -> None:
    if not parallel.uneven:
        return
    try:
        parallel.stage_layers(model.layers)
    except ValueError as error:
        raise UserError(
            f"parallel: with first_stage_layers {parallel.first_stage_layers} and last_stage_layers "
            f"{parallel.last_stage_layers}, {model.layers} layers leave {error} of pipeline "
            f"{parallel.pipeline}, which must get equally many"
        ) from None


def _check_experts(model: ModelConfig, parallel: ParallelConfig) -> None:
    if parallel.expert == 1:
        return
    if model.experts is None:
        raise UserError(
            f"parallel: expert {parallel.expert} distributes experts, and the model has none; set expert to 1"
        )
    if model.experts.count % parallel.expert:
        raise UserError(
            f"parallel: expert {parallel.expert} does not divide the model's {model.experts.count} experts; "
            f"set expert to {_divisor(parallel.expert, model.experts.count)}"
        )


def check_world(parallel: ParallelConfig, world_size: int) -> None:
    """Checks that `world_size` ranks form whole replicas of the model, and hold all experts equally often.

    Raises:
        UserError: they do not.
    """
    if world_size % parallel.replica_size:
        raise UserError(
            f"parallel: tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context} "
            f"= {parallel.replica_size} does not divide the {world_size} processes; "
            f"start a multiple of {parallel.smallest_world}"
        )
    if world_size % parallel.smallest_world:
        raise UserError(
            f"parallel: expert {parallel.expert} x pipeline {parallel.pipeline} does not divide the "
            f"{world_size} processes; start a multiple of {parallel.smallest_world}"
        )


def check_native_split(pipeline: int, context: int) -> None:
    """Refuses what the native engine cannot decode: layers or rows that are split over processes.

    Raises:
        UserError: one of the two sizes is not 1.
    """
    sizes = (("pipeline", pipeline), ("context", context))
    over = " and ".join(f"{name} {size}" for name, size in sizes if size > 1)
    if over:
        raise UserError(
            f"native engine: {over} is not supported: every process decodes all layers, split over a tensor "
            "group only; use rollout servers (SGLang; or mode replay with any server engine), or set "
            "parallel.pipeline and parallel.context to 1"
        )


def check_native_heads(heads: int, kv_heads: int, tensor: int) -> None:
    """Checks that `tensor` processes of the native engine can share attention's heads.

    Raises:
        UserError: a head would be cut.
    """
    for name, size in (("heads", heads), ("kv_heads", kv_heads)):
        if size % tensor:
            raise UserError(
                f"native engine: tensor {tensor} does not divide the model's {name} {size}; "
                f"set parallel.tensor to {_divisor(tensor, heads, kv_heads)}"
            )


def _divisor(limit: int, *sizes: int) -> int:
    """Returns the largest number up to `limit` that divides all sizes."""
    return next(n for n in range(limit, 0, -1) if not any(size % n for size in sizes))
