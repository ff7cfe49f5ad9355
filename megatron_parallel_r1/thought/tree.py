"""The tree of a flat trace in any format: blocks, paths, summaries. The tags below are Parallel-R1's.

All indices refer to the flat token list that was parsed; `stop` is exclusive.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Path:
    """`<Path> … </Path>`, from its first forced token. Not closed if the trace ended inside it.

    `begin` counts the tokens that the engine forces at its begin, at least the tag.
    """

    start: int
    stop: int
    closed: bool
    blocks: tuple[Block, ...] = ()
    begin: int = 1

    def __post_init__(self) -> None:
        assert self.start < self.stop, f"empty path {self.start}..{self.stop}"

    @property
    def inside(self) -> tuple[int, int]:
        """The span between its forced begin and its end tag."""
        return self.start + self.begin, self.stop - self.closed


@dataclass(frozen=True, slots=True)
class Summary:
    """`<Summary> … </Summary>`; `start` is the index of `<Summary>`, `begin` as of a path."""

    start: int
    stop: int
    closed: bool
    begin: int = 1

    def __post_init__(self) -> None:
        assert self.start < self.stop, f"empty summary {self.start}..{self.stop}"

    @property
    def inside(self) -> tuple[int, int]:
        """The span between its forced begin and its end tag."""
        return self.start + self.begin, self.stop - self.closed


@dataclass(frozen=True, slots=True)
class Block:
    """`<Parallel>` path+ `</Parallel> <Summary> … </Summary>`; `start` is the index of `<Parallel>`.

    Attributes:
        end: index of the first token forced behind the paths, such as `</Parallel>`; None if the trace ended
            before it.
        planned: the paths that its plan asks for; None in a format without plans.
        joined: forced tokens from `end` on, up to the summary's own tag.
        behind: forced tokens behind the summary.
        summarised: whether the format has summaries.
    """

    start: int
    paths: tuple[Path, ...]
    end: int | None
    summary: Summary | None
    planned: int | None = None
    joined: int = 1
    behind: int = 0
    summarised: bool = True

    def __post_init__(self) -> None:
        assert self.paths, f"the block at {self.start} has no path"
        edges = [self.start, *(edge for path in self.paths for edge in (path.start, path.stop))]
        assert edges[1:] == sorted(edges[1:]) and edges[0] < edges[1], f"paths overlap: {edges}"
        assert self.summary is None or (self.end is not None and self.end <= self.summary.start)

    @property
    def well_formed(self) -> bool:
        """Whether there are two paths or more, as planned, all closed, and any summary is closed."""
        planned = self.planned is None or len(self.paths) == self.planned
        paths_closed = len(self.paths) >= 2 and planned and all(path.closed for path in self.paths)
        if not self.summarised:
            return paths_closed and self.end is not None
        return paths_closed and self.summary is not None and self.summary.closed

    @property
    def fork(self) -> int:
        """The index after the last token that all paths see."""
        return self.paths[0].start

    @property
    def own_ends(self) -> tuple[int, ...]:
        """The index after each path and after the summary: the end tags that a policy should write."""
        closing = (self.summary.stop,) if self.summary is not None else ()
        return (*(path.stop for path in self.paths), *closing)

    def stop(self, length: int) -> int:
        """Returns the index of the first token after the block, of a trace of `length` tokens."""
        if self.summary is not None:
            return self.summary.stop + self.behind
        return length if self.end is None else self.end + self.joined

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
        """Returns the indices of what an engine inserts: `<Path>`, `</Parallel>`, `<Summary>` and the like.

        A rollout also forces the `</Path>` of a truncated path; only a trace records that, not its text.
        """
        indices: set[int] = set()
        for _, block in self.all_blocks():
            for path in block.paths:
                indices.update(range(path.start, path.inside[0]))
            if block.end is not None:
                indices.update(range(block.end, block.end + block.joined))
            if block.summary is not None:
                indices.update(range(block.summary.start, block.summary.inside[0]))
                indices.update(range(block.summary.stop, block.summary.stop + block.behind))
        return frozenset(indices)

    def main_spans(self) -> Iterator[tuple[int, int]]:
        """Yields (start, stop) outside all blocks and summaries; an answer counts only there."""
        start = 0
        for block in self.blocks:
            yield start, block.start
            start = block.stop(self.length)
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
