"""Decoding on shapes that recur: a pass of one token a context, filled up so that a CUDA graph can replay it.

A pass launches dozens of kernels a layer, each of a few microseconds of work when few contexts decode, so
that the GPU waits for the host; a graph launches them all at once. It is bound to the addresses and shapes
that it was captured with: rows and lengths are rounded up to powers of two, each with buffers and a graph.

Shapes: N rows, T longest context, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from megatron_parallel_r1.rollout.native.forward_batch import ForwardBatch, Group

# Smaller passes are filled up to these.
LEAST_ROWS, LEAST_LENGTH = 8, 128
# Columns of the buffer before the seen slots: token, position, slot, length.
COLUMNS = 4


class Passes(Protocol):
    """What is asked of `DecodeModel`, whose attributes and arguments these are."""

    cache_LSX: list[torch.Tensor]

    @property
    def device(self) -> torch.device: ...

    @property
    def most_cells(self) -> int: ...

    def forward(
        self,
        tokens_N: torch.Tensor,
        positions_N: torch.Tensor,
        slots_N: torch.Tensor,
        seen_NT: torch.Tensor,
        lengths_N: torch.Tensor,
        wanted: torch.Tensor,
        groups: list[Group],
    ) -> torch.Tensor: ...


class _Shape:
    """The buffers of one size of pass, and its graph where there is CUDA."""

    def __init__(self, model: Passes, rows: int, length: int) -> None:
        self._model = model
        on_gpu = model.device.type == "cuda"
        self._host_NX = torch.zeros(rows, COLUMNS + length, dtype=torch.int64, pin_memory=on_gpu)
        self._given_NX = self._host_NX.to(model.device)
        self._sent = torch.cuda.Event() if on_gpu else None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits_NV: torch.Tensor | None = None
        self._wanted = torch.arange(rows, device=model.device)
        step = max(1, model.most_cells // length)
        self._groups = [(start, min(start + step, rows), length) for start in range(0, rows, step)]

    def logits(self, asked: ForwardBatch, pool: object) -> torch.Tensor:
        """Those of the asked rows [N, V], the caller's own."""
        count = len(asked)
        self._fill(asked)
        if self._sent is None:
            return self._pass()[:count]
        if self._graph is None:
            self._capture(pool)
        self._graph.replay()
        # The next replay writes here again, while contexts keep what they were given.
        return self._logits_NV[:count].clone()

    def _fill(self, asked: ForwardBatch) -> None:
        if self._sent is not None:
            self._sent.synchronize()  # The last copy may still read the pinned memory.
        host_NX = self._host_NX.numpy()
        count, length = asked.seen_NT.shape
        columns = (asked.tokens_N, asked.positions_N, asked.slots_N, asked.lengths_N)
        host_NX[:count, :COLUMNS] = np.stack(columns, 1)
        host_NX[:count, COLUMNS : COLUMNS + length] = asked.seen_NT
        # Rows beyond are the first once more: what they write to its slot is what it writes itself.
        host_NX[count:] = host_NX[0]
        self._given_NX.copy_(self._host_NX, non_blocking=True)
        if self._sent is not None:
            self._sent.record()

    def _pass(self) -> torch.Tensor:
        tokens_N, positions_N, slots_N, lengths_N = self._given_NX[:, :COLUMNS].unbind(1)
        return self._model.forward(
            tokens_N, positions_N, slots_N, self._given_NX[:, COLUMNS:], lengths_N, self._wanted, self._groups
        )

    def _capture(self, pool: object) -> None:
        # Libraries make their handles and choose their kernels in a first pass, which no graph may hold.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._pass()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads go on with their own work on the GPU; it is no part of the graph.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._logits_NV = self._pass()


class GraphRunner:
    """Passes of one token a context over a model's weights and cache; on a CPU without graphs.

    Args:
        model: of one process, without experts, whose choice would make shapes depend on numbers.
    """

    def __init__(self, model: Passes) -> None:
        self._model = model
        self._cache: torch.Tensor | None = None
        self._shapes: dict[tuple[int, int], _Shape] = {}
        self._pool = torch.cuda.graph_pool_handle() if model.device.type == "cuda" else None

    def logits(self, asked: ForwardBatch) -> torch.Tensor:
        """Writes each row's key and value into its slot; logits [N, V], float32."""
        if self._cache is not self._model.cache_LSX[0]:  # It grew, and lies elsewhere now.
            self._shapes.clear()
            self._cache = self._model.cache_LSX[0]
        size = (_filled(len(asked), LEAST_ROWS), _filled(asked.seen_NT.shape[1], LEAST_LENGTH))
        if size not in self._shapes:
            self._shapes[size] = _Shape(self._model, *size)
        return self._shapes[size].logits(asked, self._pool)


def _filled(count: int, least: int) -> int:
    """The next power of two, from `least` on."""
    return max(least, 1 << (count - 1).bit_length())
