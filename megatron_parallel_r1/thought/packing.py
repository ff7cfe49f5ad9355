"""Packing: many traces in one row, none of which sees another.

Shapes: L tokens of a packed row, D hidden intervals per token, K = 2 + 2 D.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_parallel_r1.thought.layout import Int32, Row

PerToken = Sequence[float] | NDArray[np.float64]
"""One value per response token of a trace."""
PerTrace = Sequence[PerToken] | Mapping[int, PerToken]
"""Such values of traces, by their index."""


@dataclass(frozen=True, eq=False, slots=True)
class PackedRow:
    """Concatenated rows.

    Attributes:
        tokens_L, positions_L: token ids and rotary positions.
        layout_KL: int32, carried by Megatron as `attention_mask`: row 0 is the index of the query itself, row
            1 the start of its document, then lo and hi of each hidden interval.
        labels_L: the token that index l predicts, where it carries loss, else -1.
        segment_ids: the indices of the concatenated rows, in order.
        segment_L, source_L: for the token that index l predicts, its row as an index into `segment_ids` and
            its index in that trace's response; -1 where nothing is predicted.
    """

    tokens_L: Int32
    positions_L: Int32
    layout_KL: Int32
    labels_L: Int32
    segment_ids: tuple[int, ...]
    segment_L: Int32
    source_L: Int32

    def __len__(self) -> int:
        return len(self.tokens_L)

    @property
    def target_count(self) -> int:
        """The number of tokens with loss."""
        return int((self.labels_L >= 0).sum())

    def gather(self, values: PerTrace) -> NDArray[np.float32]:
        """Gathers per-token values of the original traces along the row; 0 where nothing is predicted.

        Args:
            values: one value per response token, by index of the row; at least of the rows of this one.
        """
        values_L = np.zeros(len(self), np.float32)
        for place, segment_id in enumerate(self.segment_ids):
            here = self.segment_L == place
            values_L[here] = np.asarray(values[segment_id], np.float32)[self.source_L[here]]
        return values_L


def pack(rows: Sequence[Row], capacity: int, indices: Sequence[int] | None = None) -> list[PackedRow]:
    """Packs rows by first-fit decreasing, so that no packed row exceeds `capacity` tokens.

    A row longer than `capacity` is packed alone: a trace is never cut.

    Args:
        indices: of the rows to pack; None: all.
    """
    return [concatenate(rows, chosen) for chosen in first_fit([len(row) for row in rows], capacity, indices)]


def first_fit(lengths: Sequence[int], capacity: int, indices: Sequence[int] | None = None) -> list[list[int]]:
    """Returns the indices of the rows that `pack` concatenates, each list in rising order.

    Args:
        lengths: of all rows.
    """
    chosen: list[list[int]] = []
    room: list[int] = []
    for index in sorted(indices if indices is not None else range(len(lengths)), key=lambda i: -lengths[i]):
        size = lengths[index]
        place = next((place for place, free in enumerate(room) if free >= size), None)
        if place is None:
            chosen.append([index])
            room.append(capacity - size)
        else:
            chosen[place].append(index)
            room[place] -= size
    return [sorted(together) for together in chosen]


def balanced_partition(sizes: Sequence[int], parts: int) -> list[list[int]]:
    """Partitions the indices of `sizes` into parts of nearly equal sum, greedily from the largest."""
    partition: list[list[int]] = [[] for _ in range(parts)]
    sums = [0] * parts
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        smallest = sums.index(min(sums))
        partition[smallest].append(index)
        sums[smallest] += sizes[index]
    return [sorted(part) for part in partition]


def pad(row: PackedRow, multiple: int) -> PackedRow:
    """Pads a row to a multiple of `multiple` tokens; a padding token sees only itself and carries no loss.

    An empty row becomes a row of padding, for a rank without work while others have some.
    """
    count = -len(row) % multiple if len(row) else multiple
    if not count:
        return row
    index_N = np.arange(len(row), len(row) + count, dtype=np.int32)
    layout_KN = np.zeros((len(row.layout_KL), count), np.int32)
    layout_KN[:2] = index_N

    def fill(values_L: Int32, value: int) -> Int32:
        return np.concatenate([values_L, np.full(count, value, np.int32)])

    return PackedRow(
        tokens_L=fill(row.tokens_L, 0),
        positions_L=fill(row.positions_L, 0),
        layout_KL=np.concatenate([row.layout_KL, layout_KN], axis=1),
        labels_L=fill(row.labels_L, -1),
        segment_ids=row.segment_ids,
        segment_L=fill(row.segment_L, -1),
        source_L=fill(row.source_L, -1),
    )


def context_indices(length: int, rank: int, size: int) -> NDArray[np.int64]:
    """Returns the indices of a row on one of `size` context-parallel ranks: an early and a late chunk.

    In causal order late queries see more; with chunks r and 2 size - 1 - r every rank has equal work.

    Args:
        length: the length of the row, a multiple of 2 size (`pad`).
    """
    if size == 1:
        return np.arange(length)
    chunks = np.arange(length).reshape(2 * size, -1)
    return np.concatenate([chunks[rank], chunks[2 * size - 1 - rank]])


def context_shard(row: PackedRow, rank: int, size: int) -> PackedRow:
    """Returns one context-parallel rank's shard of a row; its layout keeps the indices of the whole row."""
    here = context_indices(len(row), rank, size)
    return PackedRow(
        tokens_L=row.tokens_L[here],
        positions_L=row.positions_L[here],
        layout_KL=row.layout_KL[:, here],
        labels_L=row.labels_L[here],
        segment_ids=row.segment_ids,
        segment_L=row.segment_L[here],
        source_L=row.source_L[here],
    )


def concatenate(rows: Sequence[Row] | Mapping[int, Row], indices: Sequence[int]) -> PackedRow:
    """Concatenates `rows[i] for i in indices`."""
    chosen = [rows[index] for index in indices]
    starts = np.cumsum([0, *(len(row) for row in chosen)])
    length, levels = int(starts[-1]), max((len(row.hide_lo_DL) for row in chosen), default=0)
    layout_KL = np.zeros((2 + 2 * levels, length), np.int32)
    layout_KL[0] = np.arange(length)
    source_L = np.full(length, -1, np.int32)
    segment_L = np.full(length, -1, np.int32)
    for place, (row, start) in enumerate(zip(chosen, starts[:-1], strict=True)):
        here = slice(start, start + len(row))
        layout_KL[1, here] = start
        for level in range(len(row.hide_lo_DL)):
            used_L = row.hide_lo_DL[level] < row.hide_hi_DL[level]
            layout_KL[2 + 2 * level, here] = np.where(used_L, row.hide_lo_DL[level] + start, 0)
            layout_KL[3 + 2 * level, here] = np.where(used_L, row.hide_hi_DL[level] + start, 0)
        # Index l predicts the token at l + 1, and the first token of a document is never predicted.
        source_L[start : start + len(row) - 1] = row.source_L[1:]
        segment_L[start : start + len(row) - 1] = np.where(row.source_L[1:] >= 0, place, -1)
    tokens_L = np.concatenate([np.zeros(0, np.int32), *(row.tokens_L for row in chosen)])
    return PackedRow(
        tokens_L=tokens_L,
        positions_L=np.concatenate([np.zeros(0, np.int32), *(row.positions_L for row in chosen)]),
        layout_KL=layout_KL,
        labels_L=np.where(source_L >= 0, np.roll(tokens_L, -1), -1).astype(np.int32),
        segment_ids=tuple(indices),
        segment_L=segment_L,
        source_L=source_L,
    )
