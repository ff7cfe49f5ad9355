"""The paper's format check (arXiv 2509.07980) on the tree of a trace.

A trace passes if it has at least one block; every block, nested ones included, has at least two paths, all
closed, and one closed summary directly after it; and there is no tag elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_parallel_r1.thought.tree import Block, Tree


@dataclass(frozen=True, slots=True)
class Format:
    """Counts of a trace's parallel structure, for rewards and metrics.

    Attributes:
        blocks: parallel blocks at any depth.
        well_formed_blocks: blocks with at least two closed paths, as many as a plan asks for, and a closed
            summary where the format has one.
        paths: paths of all blocks.
        problems: problems of the lenient parse: misplaced tags, text where a tag is required.
    """

    blocks: int = 0
    well_formed_blocks: int = 0
    paths: int = 0
    problems: int = 0

    def __post_init__(self) -> None:
        assert 0 <= self.well_formed_blocks <= self.blocks <= self.paths, self
        assert self.problems >= 0, self

    @classmethod
    def of(cls, tree: Tree, sampled: Sequence[bool] | None = None) -> Format:
        """Counts one trace.

        Args:
            sampled: which tokens the policy drew: a block with a path or summary that the engine closed is
                not well formed. None: counts every closing tag.
        """
        blocks = [block for _, block in tree.all_blocks()]
        return cls(
            blocks=len(blocks),
            well_formed_blocks=sum(_well_formed(block, sampled) for block in blocks),
            paths=sum(len(block.paths) for block in blocks),
            problems=len(tree.problems),
        )

    @property
    def parallel(self) -> bool:
        """Whether there is any block, well formed or not; the parallel ratio counts these."""
        return self.blocks > 0

    @property
    def well_formed(self) -> bool:
        """Whether the trace passes the format check."""
        return self.parallel and self.well_formed_blocks == self.blocks and not self.problems


def _well_formed(block: Block, sampled: Sequence[bool] | None) -> bool:
    if not block.well_formed or sampled is None:
        return block.well_formed
    return all(sampled[end - 1] for end in block.own_ends)


def well_formed_parallel(tree: Tree) -> bool:
    """Returns whether a trace passes the format check; False for one without blocks."""
    return Format.of(tree).well_formed
