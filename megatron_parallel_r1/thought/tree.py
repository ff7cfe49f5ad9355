"""The tree of a flat trace: blocks, their paths and summaries.

All indices refer to the flat token list that was parsed; `stop` is exclusive.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Path:
    """`<Path> … </Path>`; `start` is the index of `<Path>`. Not closed if the trace ended inside it."""

    start: int
    stop: int
    closed: bool
    blocks: tuple[Block, ...] = ()

    def __post_init__(self) -> None:
        assert self.start < self.stop, f"empty path {self.start}..{self.stop}"


@dataclass(frozen=True, slots=True)
class Summary:
    """`<Summary> … </Summary>`; `start` is the index of `<Summary>`."""

    start: int
    stop: int
    closed: bool

    def __post_init__(self) -> None:
        assert self.start < self.stop, f"empty summary {self.start}..{self.stop}"


@dataclass(frozen=True, slots=True)
class Block:
    """`<Parallel>` path+ `</Parallel> <Summary> … </Summary>`; `start` is the index of `<Parallel>`.

    `end` is the index of `</Parallel>`, None if the trace ended before it.
    """

    start: int
    paths: tuple[Path, ...]
    end: int | None
    summary: Summary | None

    def __post_init__(self) -> None:
        assert self.paths, f"the block at {self.start} has no path"
        edges = [self.start, *(edge for path in self.paths for edge in (path.start, path.stop))]
        assert edges[1:] == sorted(edges[1:]) and edges[0] < edges[1], f"paths overlap: {edges}"
        assert self.summary is None or (self.end is not None and self.end < self.summary.start)

    @property
    def well_formed(self) -> bool:
        """Whether there are at least two paths, all closed, and a closed summary."""
        paths_closed = len(self.paths) >= 2 and all(path.closed for path in self.paths)
        return paths_closed and self.summary is not None and self.summary.closed

    def segments(self, length: int) -> tuple[tuple[int, int], ...]:
        """Returns the span of each path up to the next path, `</Parallel>` or the end of the trace.

        Stray text between paths, which a lenient parse accepts, belongs to the path before it.
        """
        starts = [path.start for path in self.paths]
        last = self.end if self.end is not None else length
        return tuple(zip(starts, [*starts[1:], last], strict=True))


@dataclass(frozen=True, slots=True)
class ParseProblem:
    """A problem that a lenient parse recorded, and the index of its token."""

    index: int
    what: str


@dataclass(frozen=True, slots=True)
class Tree:
    """A parsed trace of `length` tokens; without blocks it is sequential."""

    length: int
    blocks: tuple[Block, ...] = ()
    problems: tuple[ParseProblem, ...] = ()

    def all_blocks(self) -> Iterator[tuple[int, Block]]:
        """Yields (depth, block) in order of appearance; depth 0 is the main chain."""
        yield from _walk(self.blocks, 0)

    def forced(self) -> frozenset[int]:
        """Returns the indices of the tags that an engine inserts: `<Path>`, `</Parallel>` and `<Summary>`.

        A rollout also forces the `</Path>` of a truncated path; only a trace records that, not its text.
        """
        indices: set[int] = set()
        for _, block in self.all_blocks():
            indices.update(path.start for path in block.paths)
            if block.end is not None:
                indices.add(block.end)
            if block.summary is not None:
                indices.add(block.summary.start)
        return frozenset(indices)

    def main_spans(self) -> Iterator[tuple[int, int]]:
        """Yields (start, stop) outside all blocks and summaries; an answer counts only there."""
        start = 0
        for block in self.blocks:
            yield start, block.start
            if block.summary is not None:
                start = block.summary.stop
            else:
                start = self.length if block.end is None else block.end + 1
        yield start, self.length

    @property
    def depth(self) -> int:
        """The number of nesting levels, 0 without blocks."""
        return max((depth + 1 for depth, _ in self.all_blocks()), default=0)


def _walk(blocks: tuple[Block, ...], depth: int) -> Iterator[tuple[int, Block]]:
    for block in blocks:
        yield depth, block
        for path in block.paths:
            yield from _walk(path.blocks, depth + 1)
