"""A rank's share of a batch: which packed rows it trains, and each as the input of one forward pass.

Rows are partitioned over the data-parallel ranks by length, so that none waits long for another; each rank
packs its share. Results do not depend on the partition: loss and gradient are sums over tokens, divided by
the number of tokens of the whole batch. All targets of a trace are in one packed row; under context
parallelism that row is split over ranks, and sums over a trace run over their group.

Shapes: L tokens of the row, N targets (tokens with loss) on this rank, K rows of the layout, T traces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from numpy.typing import NDArray
from torch.distributed.nn.functional import all_reduce

from megatron_parallel_r1.distributed.parallel_config import ParallelConfig
from megatron_parallel_r1.model.layers import FP8_ROWS
from megatron_parallel_r1.thought.layout import Row
from megatron_parallel_r1.thought.packing import (
    PackedRow,
    PerTrace,
    balanced_partition,
    concatenate,
    context_shard,
    first_fit,
    pad,
)
from megatron_parallel_r1.utils.devices import to_device


@dataclass(frozen=True, slots=True)
class BatchPartition:
    """This rank's data- and context-parallel place among those that share a batch.

    Attributes:
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


def partition(
    lengths: Sequence[int], capacity: int, place: BatchPartition, indices: Sequence[int] | None = None
) -> list[list[int]]:
    """Returns which rows each packed row of this rank holds. Every rank gets equally many; some may be empty.

    Args:
        lengths: of the rows of the whole batch, the same on every rank.
        capacity: tokens of a packed row, a multiple of `place.multiple`.
        indices: of the rows to partition; None: all.
    """
    indices = range(len(lengths)) if indices is None else indices
    hands = balanced_partition([lengths[index] for index in indices], place.data_size)
    packed = [first_fit(lengths, capacity, [indices[i] for i in hand]) for hand in hands]
    count = max(map(len, packed))
    count += -count % place.rounds
    return packed[place.data] + [[]] * (count - len(packed[place.data]))


def pack_share(
    rows: Sequence[Row] | Mapping[int, Row], share: Sequence[Sequence[int]], place: BatchPartition
) -> list[PackedRow]:
    """Packs the rows of this rank as `partition` says; an empty one becomes a row of padding.

    Args:
        rows: by index, at least those of the share.
    """
    whole = [pad(concatenate(rows, chosen), place.multiple) for chosen in share]
    if place.rounds > 1:
        whole = [pad(row, max(map(len, whole))) for row in whole]
    return [context_shard(row, place.context, place.context_size) for row in whole]


def partition_rows(rows: Sequence[Row], capacity: int, place: BatchPartition) -> list[PackedRow]:
    """Packs this rank's share of rows that every rank has laid out."""
    return pack_share(rows, partition([len(row) for row in rows], capacity, place), place)


@dataclass(frozen=True, eq=False, slots=True)
class Segments:
    """The traces of a micro-batch.

    Attributes:
        segment_N: int64, the trace of each target, 0..count - 1.
        count: number of traces in the whole row, including those without a target here.
        group: ranks that hold parts of the same row; None: the row is whole here.
    """

    segment_N: torch.Tensor
    count: int
    group: dist.ProcessGroup | None = None

    def totals(self, values_N: torch.Tensor) -> torch.Tensor:
        """The sum over each trace's targets, float64 [T], the same on all ranks of the group.

        Differentiable: backward sums gradients over the group as forward sums values. That is right because
        the loss is the sum over ranks, each over its own targets: a value here changes the total of its
        trace, and that total enters the loss of every rank with targets of the trace. (It would be wrong if
        all ranks computed the same loss, as tensor-parallel ranks do.)

        A collective: all ranks of the group call it, including those without targets.
        """
        totals_T = values_N.new_zeros(self.count, dtype=torch.float64)
        totals_T = totals_T.index_add(0, self.segment_N, values_N.double())
        if self.group is not None and self.group.size() > 1:
            totals_T = all_reduce(totals_T, group=self.group)
        return totals_T

    def sums(self, values_N: torch.Tensor) -> torch.Tensor:
        """For each target the sum over its trace, in the dtype of `values_N`."""
        return self.totals(values_N)[self.segment_N].to(values_N.dtype)

    def means(self, values_N: torch.Tensor) -> torch.Tensor:
        """For each target the mean over its trace, in the dtype of `values_N`."""
        counts_T = self.totals(torch.ones_like(values_N)).clamp(min=1)
        return (self.totals(values_N) / counts_T)[self.segment_N].to(values_N.dtype)


@dataclass(frozen=True, eq=False, slots=True)
class MicroBatch:
    """A packed row on the training device.

    Attributes:
        at_N: index in the row of the token that predicts each target.
        labels_N: token id of each target.
        suppressed_N: the token that could not be drawn in its place, -1 where every token could.
        segments: the trace that each target belongs to, as an index into `row.segment_ids`.
        values: named float32 vectors over the targets, such as advantages.
        row: the packed row that the tensors were built from.
        experts_LXC: the C experts that a token goes through in each of X layers, int16; None: the router's.
    """

    tokens_1L: torch.Tensor
    positions_1L: torch.Tensor
    layout_KL: torch.Tensor
    at_N: torch.Tensor
    labels_N: torch.Tensor
    suppressed_N: torch.Tensor
    segments: Segments
    values: dict[str, torch.Tensor]
    row: PackedRow
    experts_LXC: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        row: PackedRow,
        device: torch.device,
        values: Mapping[str, PerTrace] | None = None,
        suppressed: PerTrace | None = None,
        suppressed_token: int = -1,
    ) -> MicroBatch:
        """Copies a row and the values of its targets to a device.

        Args:
            values: by name, per-token values of the row's traces.
            suppressed: of those traces, where `suppressed_token` could not be drawn.
        """
        at_N = np.flatnonzero(row.labels_L >= 0)
        suppressed_L = np.zeros(len(row)) if suppressed is None else row.gather(suppressed)

        def tensor(array: NDArray) -> torch.Tensor:
            return to_device(array, device)

        batch = cls(
            tokens_1L=tensor(row.tokens_L.astype(np.int64))[None],
            positions_1L=tensor(row.positions_L.astype(np.int64))[None],
            layout_KL=tensor(row.layout_KL),
            at_N=tensor(at_N),
            labels_N=tensor(row.labels_L[at_N].astype(np.int64)),
            suppressed_N=tensor(np.where(suppressed_L[at_N] > 0, suppressed_token, -1)),
            segments=Segments(
                tensor(row.segment_L[at_N].astype(np.int64)),
                len(row.segment_ids),
                parallel_state.get_context_parallel_group(),
            ),
            values={},
            row=row,
        )
        for name, per_trace in (values or {}).items():
            batch.spread(name, per_trace)
        return batch

    def spread(self, name: str, per_trace: PerTrace) -> None:
        """Sets a named value of the targets from one per response token of the row's traces."""
        values_N = self.row.gather(per_trace)[self.row.labels_L >= 0]
        self.values[name] = to_device(values_N, self.at_N.device)
