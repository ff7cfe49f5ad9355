"""What one forward pass takes: a packed row as tensors, with what the loss needs of each target.

Shapes: L tokens of the row, N targets (tokens with loss), K rows of the layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core import parallel_state
from numpy.typing import NDArray

from megatron_parallel_r1.thought.packing import PackedRow
from megatron_parallel_r1.train.segments import Segments

# A value for each response token of a trace.
PerToken = Sequence[float] | NDArray[np.float64]


@dataclass(frozen=True, eq=False, slots=True)
class MicroBatch:
    """A packed row on the training device.

    Attributes:
        at_N: the index of the row that predicts each target.
        labels_N: the target's token id.
        suppressed_N: the token that could not be drawn in its place, -1 where every token could.
        segments: the trace that each target belongs to, as an index into `row.members`.
        values: named float32 vectors over the targets, such as advantages.
        row: what the tensors were made of.
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

    @classmethod
    def of(
        cls,
        row: PackedRow,
        device: torch.device,
        values: Mapping[str, Sequence[PerToken]] | None = None,
        suppressed: Sequence[Sequence[bool]] | None = None,
        suppressed_token: int = -1,
    ) -> MicroBatch:
        """Puts a row and what belongs to its targets on a device.

        Args:
            values: for each name, per-token values of all traces given to `pack`.
            suppressed: of all those traces, where `suppressed_token` could not be drawn.
        """
        at_N = np.flatnonzero(row.labels_L >= 0)
        suppressed_L = np.zeros(len(row)) if suppressed is None else row.gather(suppressed)

        def tensor(array: NDArray) -> torch.Tensor:
            return _sent(array, device)

        batch = cls(
            tokens_1L=tensor(row.tokens_L.astype(np.int64))[None],
            positions_1L=tensor(row.positions_L.astype(np.int64))[None],
            layout_KL=tensor(row.layout_KL),
            at_N=tensor(at_N),
            labels_N=tensor(row.labels_L[at_N].astype(np.int64)),
            suppressed_N=tensor(np.where(suppressed_L[at_N] > 0, suppressed_token, -1)),
            segments=Segments(
                tensor(row.member_L[at_N].astype(np.int64)),
                len(row.members),
                parallel_state.get_context_parallel_group(),
            ),
            values={},
            row=row,
        )
        for name, per_trace in (values or {}).items():
            batch.spread(name, per_trace)
        return batch

    def spread(self, name: str, per_trace: Sequence[PerToken]) -> None:
        """Takes values of the targets.

        Args:
            per_trace: one for each response token of all traces given to `pack`.
        """
        values_N = self.row.gather(per_trace)[self.row.labels_L >= 0]
        self.values[name] = _sent(values_N, self.at_N.device)


def _sent(array: NDArray, device: torch.device) -> torch.Tensor:
    """A GPU's copy comes from pinned memory, so that the host does not wait for what the GPU still computes.

    torch's own allocator of pinned memory keeps the block until it has been read.
    """
    here = torch.from_numpy(np.ascontiguousarray(array))
    return here.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else here.to(device)
