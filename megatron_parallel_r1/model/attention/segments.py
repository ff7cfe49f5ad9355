"""Plans the calls of a fused causal kernel that compute a row under its layout.

Consecutive queries with the same document start and the same hidden intervals form a segment: all of them see
the same keys before it, and each other causally. So a long segment takes two calls without a mask. Short
segments share one call, with a mask over the keys that at least one of them sees.

Shapes: Q queries of this rank, K rows of the layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

# Queries from which a segment has its own calls, and the most that share one: lower values pay more per call,
# higher ones compute more masked pairs.
LONG = 64

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class KernelCall:
    """Queries start..stop against the keys of `spans`, ascending and disjoint.

    Attributes:
        mask: every query sees every key; the n-th sees the first n + 1; or the layout decides.
    """

    start: int
    stop: int
    spans: tuple[Range, ...]
    mask: Literal["whole", "causal", "layout"]


def plan_calls(layout_KQ: Tensor, long: int = LONG) -> list[tuple[KernelCall, ...]]:
    """Plans the calls, on the host; the calls of the same queries form one tuple.

    Args:
        layout_KQ: int32 layout of the queries.
        long: queries from which a segment has its own calls.
    """
    plan: list[tuple[KernelCall, ...]] = []
    waiting: list[_Segment] = []
    for segment in _segments(layout_KQ.cpu().numpy()):
        if segment.is_plain and len(segment) >= long:
            plan += _shared(waiting)
            waiting = []
            plan.append(segment.calls())
            continue
        for piece in segment.split(long):
            if waiting and piece.stop - waiting[0].start > long:
                plan += _shared(waiting)
                waiting = []
            waiting.append(piece)
    return plan + _shared(waiting)


@dataclass(frozen=True, slots=True)
class _Segment:
    """Queries start..stop, the first of which is token `index` of the row, and what is hidden from them."""

    start: int
    stop: int
    index: int
    document: int
    hidden: tuple[Range, ...]

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def is_plain(self) -> bool:
        """Whether the queries see each other causally, and the same keys before the segment."""
        return all(hi <= self.index for _, hi in self.hidden)

    def split(self, size: int) -> Iterator[_Segment]:
        for start in range(self.start, self.stop, size):
            stop = min(start + size, self.stop)
            yield _Segment(start, stop, self.index + start - self.start, self.document, self.hidden)

    def before(self, end: int) -> list[Range]:
        """Returns the tokens before `end` that the queries see, as ascending ranges."""
        seen, at = [], self.document
        for lo, hi in sorted(self.hidden):
            if at < min(lo, end):
                seen.append((at, min(lo, end)))
            at = max(at, hi)
        return [*seen, (at, end)] if at < end else seen

    def calls(self) -> tuple[KernelCall, ...]:
        own = KernelCall(self.start, self.stop, ((self.index, self.index + len(self)),), "causal")
        before = self.before(self.index)
        return (KernelCall(self.start, self.stop, tuple(before), "whole"), own) if before else (own,)


def _segments(layout_KQ: NDArray[np.int32]) -> Iterator[_Segment]:
    index_Q, *others_Q = layout_KQ
    changes = np.diff(index_Q) != 1
    for other_Q in others_Q:
        changes |= np.diff(other_Q) != 0
    bounds = [0, *(np.flatnonzero(changes) + 1).tolist(), len(index_Q)]
    for start, stop in pairwise(bounds):
        index, document, *hidden = layout_KQ[:, start].tolist()
        pairs = zip(hidden[::2], hidden[1::2], strict=True)
        yield _Segment(start, stop, index, document, tuple((lo, hi) for lo, hi in pairs if lo < hi))


def _shared(segments: Sequence[_Segment]) -> list[tuple[KernelCall, ...]]:
    """Returns the shared call of short segments; nothing for no segment."""
    if not segments:
        return []
    ranges = sorted(seen for segment in segments for seen in segment.before(segment.index + len(segment)))
    spans = [ranges[0]]
    for lo, hi in ranges[1:]:
        if lo <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(spans[-1][1], hi))
        else:
            spans.append((lo, hi))
    return [(KernelCall(segments[0].start, segments[-1].stop, tuple(spans), "layout"),)]
