"""Partitions a batch over ranks: which packed rows a rank trains, and which part of each.

Rows are partitioned over the data-parallel ranks by length, so that none waits long for another; each rank
packs its share. Results do not depend on the partition: loss and gradient are sums over tokens, divided by
the number of tokens of the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_parallel_r1.distributed.parallel_config import ParallelConfig
from megatron_parallel_r1.model.layers import FP8_ROWS
from megatron_parallel_r1.thought.layout import Row
from megatron_parallel_r1.thought.packing import (
    PackedRow,
    balanced_partition,
    concatenate,
    context_shard,
    first_fit,
    pad,
)


@dataclass(frozen=True, slots=True)
class BatchPartition:
    """This rank's place among those that share a batch.

    Attributes:
        data, data_size: data-parallel rank and size.
        context, context_size: context-parallel rank and size, for the ranks that share each row.
        multiple: rows are padded to a multiple of this many tokens, so that they split evenly.
        rounds: the number of micro-batches is a multiple of this; interleaved stages take turns in groups.
            With 2 or more, all rows have equal length, since such stages do not exchange it.
    """

    data: int = 0
    data_size: int = 1
    context: int = 0
    context_size: int = 1
    multiple: int = 1
    rounds: int = 1

    @classmethod
    def of(cls, config: TransformerConfig) -> BatchPartition:
        context_size = config.context_parallel_size
        interleaved = config.virtual_pipeline_model_parallel_size is not None
        return cls(
            data=parallel_state.get_data_parallel_rank(),
            data_size=parallel_state.get_data_parallel_world_size(),
            context=parallel_state.get_context_parallel_rank(),
            context_size=context_size,
            multiple=ParallelConfig(
                tensor=config.tensor_model_parallel_size,
                context=context_size,
                sequence=config.sequence_parallel,
            ).row_multiple
            * (FP8_ROWS if config.fp8 else 1),
            rounds=config.pipeline_model_parallel_size if interleaved else 1,
        )


def partition_rows(
    rows: Sequence[Row], capacity: int, place: BatchPartition, members: Sequence[int] | None = None
) -> list[PackedRow]:
    """Returns this rank's packed rows. Every rank gets equally many; the rest are filler rows.

    Args:
        rows: rows of the whole batch, the same on every rank.
        capacity: tokens of a packed row, a multiple of `place.multiple`.
        members: indices of the rows to partition; None: all.
    """
    members = range(len(rows)) if members is None else members
    hands = balanced_partition([len(rows[member]) for member in members], place.data_size)
    packed = [first_fit(rows, capacity, [members[index] for index in hand]) for hand in hands]
    count = max(map(len, packed))
    count += -count % place.rounds
    own = packed[place.data] + [[]] * (count - len(packed[place.data]))
    whole = [pad(concatenate(rows, chosen), place.multiple) for chosen in own]
    if place.rounds > 1:
        whole = [pad(row, max(map(len, whole))) for row in whole]
    return [context_shard(row, place.context, place.context_size) for row in whole]
