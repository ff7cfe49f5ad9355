"""The weights of each pipeline rank under a parallel layout, without building the model."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.architecture.weight_table import EMBEDDING, HEAD, weight_table
from megatron_parallel_r1.distributed.parallel_config import ParallelConfig

Named = tuple[str, tuple[int, ...]]
FINAL_NORM = "decoder.final_layernorm.weight"


@dataclass(frozen=True, slots=True)
class PipelinePart:
    """The weights of one pipeline rank; all tensor-parallel ranks have the same shapes.

    Attributes:
        rank: in the pipeline.
        chunks: the layers, from 0, of each of its stages; several if stages are interleaved.
        weights: Megatron's names in a whole model, with the shape of this rank's part.
        last: whether logits are computed here.
    """

    rank: int
    chunks: tuple[range, ...]
    weights: tuple[Named, ...]
    last: bool

    @property
    def layers(self) -> int:
        return sum(map(len, self.chunks))

    @property
    def elements(self) -> int:
        return sum(prod(size) for _, size in self.weights)


def pipeline_parts(shape: ModelConfig, parallel: ParallelConfig) -> tuple[PipelinePart, ...]:
    """Returns the part of each pipeline rank; the layout must divide the model (`check_parallel`).

    Interleaved stages are assigned in turn (arXiv 2104.04473): rank p has stages p, p + pipeline, and so on.
    The last stage of a tied model has a copy of the embedding for its logits, unless it also embeds.
    """
    each = shape.layers // (parallel.pipeline * parallel.virtual)
    sizes = {weight.name: weight.shard_shape(parallel.tensor) for weight in weight_table(shape)}
    parts = []
    for rank in range(parallel.pipeline):
        starts = [(rank + turn * parallel.pipeline) * each for turn in range(parallel.virtual)]
        chunks = tuple(range(start, start + each) for start in starts)
        last = rank == parallel.pipeline - 1
        names = [EMBEDDING] if rank == 0 else []
        for layer in (layer for chunk in chunks for layer in chunk):
            names += [name for name in sizes if name.startswith(f"decoder.layers.{layer}.")]
        if last:
            names.append(FINAL_NORM)
            if not shape.tied:
                names.append(HEAD)
            elif rank > 0:
                names.append(EMBEDDING)
        parts.append(PipelinePart(rank, chunks, tuple((name, sizes[name]) for name in names), last))
    return tuple(parts)
