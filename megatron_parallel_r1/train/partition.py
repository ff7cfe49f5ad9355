"""Which packed rows of a batch this process trains, and which part of each.

The batch is dealt to the data-parallel processes by length, so that none waits long for another; each packs
its share. Results do not depend on the deal: loss and gradient are sums over tokens, divided by the number
of tokens of the whole batch.
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
    """This process's place among those that share a batch.

    Attributes:
        data, data_size: its data-parallel rank, and how many there are.
        context, context_size: its rank among the processes that share each row.
        multiple: rows are filled up to a multiple of so many tokens, which can be split evenly.
        rounds: the number of micro-batches is a multiple of this; interleaved stages take turns in groups.
            With 2 or more all rows have one length, since such stages do not tell each other of it.
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
    """This process's packed rows; every process gets as many, empty ones of fillers if need be.

    Args:
        rows: all of the batch, the same on every process.
        capacity: tokens of a packed row, a multiple of `place.multiple`.
        members: indices of the rows to share out; None: all.
    """
    members = range(len(rows)) if members is None else members
    hands = balanced_partition([len(rows[member]) for member in members], place.data_size)
    packed = [first_fit(rows, capacity, [members[index] for index in hand]) for hand in hands]
    count = max(map(len, packed))
    count += -count % place.rounds
    mine = packed[place.data] + [[]] * (count - len(packed[place.data]))
    whole = [pad(concatenate(rows, chosen), place.multiple) for chosen in mine]
    if place.rounds > 1:
        whole = [pad(row, max(map(len, whole))) for row in whole]
    return [context_shard(row, place.context, place.context_size) for row in whole]
