"""How a model is split over processes, and what can be split so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.errors import UserError


@dataclass(frozen=True, slots=True)
class Parallel:
    """How a model is split over processes; what is left of the world is data parallel.

    Attributes:
        tensor, pipeline, context: sizes of the groups that share one copy of the model; a context group
            shares each row.
        virtual: stages that each pipeline process holds; with 2 or more they are interleaved
            (arXiv 2104.04473), which shortens the pipeline's idle time.
        sequence: whether norms and residuals are split along the tokens within a tensor group.
        recompute: what backward computes anew instead of keeping it: `full`, each layer from its input;
            `selective`, the inside of the MLP (attention keeps no scores in any case).
        sharded_optimizer: whether the data-parallel processes share Adam's state (Megatron's distributed
            optimizer) instead of each keeping all of it.
    """

    # For pydantic, which reads these settings from a recipe: an unknown key is an error.
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    context: int = 1
    sequence: bool = False
    recompute: Literal["none", "selective", "full"] = "none"
    sharded_optimizer: bool = False

    def __post_init__(self) -> None:
        sizes = ("tensor", "pipeline", "virtual", "context")
        broken = [f"{name} must be >= 1" for name in sizes if getattr(self, name) < 1]
        if self.virtual > 1 and self.pipeline == 1:
            broken.append(
                f"virtual {self.virtual} interleaves the stages of a pipeline, and pipeline is 1; "
                "set pipeline to 2 or more, or virtual to 1"
            )
        if self.sequence and self.tensor == 1:
            broken.append("sequence needs a tensor size of 2 or more; there is nothing to split over")
        if broken:
            raise ValueError("; ".join(broken))

    @property
    def copy(self) -> int:
        """Processes that hold one copy of the model."""
        return self.tensor * self.pipeline * self.context

    @property
    def multiple(self) -> int:
        """Rows are filled up to a multiple of so many tokens, so that each process has equal parts."""
        return (2 * self.context if self.context > 1 else 1) * (self.tensor if self.sequence else 1)


def check_parallel(
    shape: ModelConfig, parallel: Parallel, world: int, micro_tokens: int | None = None
) -> None:
    """Whether `world` processes can split a model so; needs no process group.

    Args:
        micro_tokens: capacity of a packed row, if there is one.

    Raises:
        UserError: something does not divide; it names the setting and a value that does.
    """
    tensor, stages = parallel.tensor, parallel.pipeline * parallel.virtual
    ffn = shape.experts.ffn if shape.experts else shape.ffn
    for name, size in (("heads", shape.heads), ("kv_heads", shape.kv_heads), ("ffn", ffn)):
        if size % tensor:
            raise UserError(
                f"parallel: tensor {tensor} does not divide the model's {name} {size}; "
                f"set tensor to {_below(tensor, shape.heads, shape.kv_heads, ffn)}"
            )
    if shape.experts and tensor > 1 and not parallel.sequence:
        raise UserError(
            f"parallel: under tensor {tensor} Megatron trains experts with sequence alone; set sequence: true"
        )
    if shape.layers % stages:
        raise UserError(
            f"parallel: {shape.layers} layers cannot be cut into pipeline {parallel.pipeline} x virtual "
            f"{parallel.virtual} = {stages} equal stages; set pipeline to {_below(stages, shape.layers)}"
            + (" and virtual to 1" if parallel.virtual > 1 else "")
        )
    check_world(parallel, world)
    if micro_tokens is not None and micro_tokens % parallel.multiple:
        more = micro_tokens + -micro_tokens % parallel.multiple
        raise UserError(
            f"micro_tokens: {micro_tokens} is no multiple of {parallel.multiple}, into which context "
            f"{parallel.context}{f' and sequence over tensor {tensor}' if parallel.sequence else ''} cut a "
            f"row; set it to {more}"
        )


def check_world(parallel: Parallel, world: int) -> None:
    """Whether `world` processes are a number of copies of the model.

    Raises:
        UserError: they are not.
    """
    if world % parallel.copy:
        raise UserError(
            f"parallel: tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context} "
            f"= {parallel.copy} does not divide the {world} processes; start a multiple of {parallel.copy}"
        )


def _below(most: int, *sizes: int) -> int:
    """The largest number up to `most` that divides all sizes."""
    return next(n for n in range(most, 0, -1) if not any(size % n for size in sizes))
