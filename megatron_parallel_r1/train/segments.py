"""Segment ids: the trace that each target belongs to, and sums over a trace's targets.

All targets of a trace are in one packed row; with context parallelism that row is split over ranks, and the
sums run over their group.

Shapes: N targets of a micro-batch on this rank, T traces of the micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_reduce


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
