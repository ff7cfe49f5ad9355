"""Which trace each target belongs to, and sums over a trace's targets.

All targets of a trace stand in one packed row; under context parallelism that row is cut over processes,
and the sums run over their group.

Shapes: N targets of a micro-batch on this process, T traces of the micro-batch.
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
        member_N: int64, of each target the place of its trace, 0..count - 1.
        count: traces of the whole row, also of those without a target here.
        group: processes that hold parts of the same row; None: the row is whole here.
    """

    member_N: torch.Tensor
    count: int
    group: dist.ProcessGroup | None = None

    def totals(self, values_N: torch.Tensor) -> torch.Tensor:
        """The sum over each trace's targets, float64 [T], the same on all processes of the group.

        Differentiable: backward sums gradients over the group as forward sums values. That is right because
        the loss is the sum of what the processes return, each over its own targets: a value here moves the
        total of its trace, and that total stands in the loss of every process with targets of the trace.
        (Where all processes compute one and the same loss, as tensor-parallel ones do, it would be wrong.)

        All processes of the group must come here together, those without targets too.
        """
        totals_T = values_N.new_zeros(self.count, dtype=torch.float64)
        totals_T = totals_T.index_add(0, self.member_N, values_N.double())
        if self.group is not None and self.group.size() > 1:
            totals_T = all_reduce(totals_T, group=self.group)
        return totals_T

    def sums(self, values_N: torch.Tensor) -> torch.Tensor:
        """The total of its trace for each target, in the dtype of `values_N`."""
        return self.totals(values_N)[self.member_N].to(values_N.dtype)

    def means(self, values_N: torch.Tensor) -> torch.Tensor:
        """The mean over its trace's targets for each target, in the dtype of `values_N`."""
        counts_T = self.totals(torch.ones_like(values_N)).clamp(min=1)
        return (self.totals(values_N) / counts_T)[self.member_N].to(values_N.dtype)
