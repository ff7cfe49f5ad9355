"""Decodes on recurring shapes: a pass of one token per context, padded so that a CUDA graph can replay it.

A pass launches dozens of kernels per layer, each of a few microseconds of work when few contexts decode, so
that the GPU waits for the host; a graph launches them all at once. It is bound to the addresses and shapes
that it was captured with: rows and lengths are rounded up to powers of two, each with buffers and a graph.

Shapes: N rows, T longest context, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from megatron_parallel_r1.rollout.native.model import DecodeModel
from megatron_parallel_r1.rollout.native.page_table import ForwardBatch

# Smaller passes are padded to these.
MIN_ROWS, MIN_LENGTH = 8, 128
# Columns of the buffer before the seen slots: token, position, slot, length.
COLUMNS = 4


class _GraphBuffers:
    """The buffers of one size of pass, and its graph where there is CUDA."""

    def __init__(self, model: DecodeModel, rows: int, length: int) -> None:
        self._model = model
        on_gpu = model.device.type == "cuda"
        self._host_NX = torch.zeros(rows, COLUMNS + length, dtype=torch.int64, pin_memory=on_gpu)
        self._device_NX = self._host_NX.to(model.device)
        self._sent = torch.cuda.Event() if on_gpu else None
        self._captured: tuple[torch.cuda.CUDAGraph, torch.Tensor] | None = None
        self._wanted = torch.arange(rows, device=model.device)
        step = max(1, model.max_cells // length)
        self._groups = [(start, min(start + step, rows), length) for start in range(0, rows, step)]

    def logits(self, batch: ForwardBatch, pool: Any) -> torch.Tensor:
        """Logits [N, V] of the batch; the caller owns them."""
        count = len(batch)
        self._fill(batch)
        if self._sent is None:
            return self._pass()[:count]
        if self._captured is None:
            self._captured = self._capture(pool)
        graph, logits_NV = self._captured
        graph.replay()
        # The next replay overwrites them, while contexts keep theirs.
        return logits_NV[:count].clone()

    def _fill(self, batch: ForwardBatch) -> None:
        if self._sent is not None:
            self._sent.synchronize()  # The last copy may still read the pinned memory.
        host_NX = self._host_NX.numpy()
        count, length = batch.seen_NT.shape
        columns = (batch.tokens_N, batch.positions_N, batch.slots_N, batch.lengths_N)
        host_NX[:count, :COLUMNS] = np.stack(columns, 1)
        host_NX[:count, COLUMNS : COLUMNS + length] = batch.seen_NT
        # Padding repeats the first row: it writes the same values to the same slot.
        host_NX[count:] = host_NX[0]
        self._device_NX.copy_(self._host_NX, non_blocking=True)
        if self._sent is not None:
            self._sent.record()

    def _pass(self) -> torch.Tensor:
        tokens_N, positions_N, slots_N, lengths_N = self._device_NX[:, :COLUMNS].unbind(1)
        columns = (tokens_N, positions_N, slots_N, self._device_NX[:, COLUMNS:], lengths_N)
        return self._model.forward(*columns, wanted=self._wanted, groups=self._groups)

    def _capture(self, pool: Any) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        # Libraries create handles and choose kernels in a first pass, which no graph may capture.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._pass()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Work of other threads on the GPU is not part of the graph.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            logits_NV = self._pass()
        return graph, logits_NV


class GraphRunner:
    """Runs passes of one token per context over a model's weights and cache; on a CPU without graphs.

    Args:
        model: of one process, without experts, whose choice would make shapes depend on values.
    """

    def __init__(self, model: DecodeModel) -> None:
        self._model = model
        self._cache: torch.Tensor | None = None
        self._buffers: dict[tuple[int, int], _GraphBuffers] = {}
        self._pool = torch.cuda.graph_pool_handle() if model.device.type == "cuda" else None

    def logits(self, batch: ForwardBatch) -> torch.Tensor:
        """Writes each row's key and value into its slot; returns logits [N, V], float32."""
        if self._cache is not self._model.cache_LSX[0]:  # It grew, and was moved.
            self._buffers.clear()
            self._cache = self._model.cache_LSX[0]
        size = (_padded(len(batch), MIN_ROWS), _padded(batch.seen_NT.shape[1], MIN_LENGTH))
        if size not in self._buffers:
            self._buffers[size] = _GraphBuffers(self._model, *size)
        return self._buffers[size].logits(batch, self._pool)


def _padded(count: int, minimum: int) -> int:
    """The next power of two, at least `minimum`."""
    return max(minimum, 1 << (count - 1).bit_length())
