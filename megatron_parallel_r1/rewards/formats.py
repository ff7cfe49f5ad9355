"""The paper's format check (arXiv 2509.07980), read off a trace's tree.

A trace thinks in parallel, well formed, where it has a block at least, and every block, nested ones too, has
two paths or more, all closed, and right behind it one closed summary; and no tag stands elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_parallel_r1.thought.tree import Block, Tree


@dataclass(frozen=True, slots=True)
class Format:
    """What a trace's parallel structure amounts to, for rewards and metrics.

    Attributes:
        blocks: parallel blocks at any depth.
        well_formed_blocks: those with two closed paths or more and a closed summary.
        paths: paths in all blocks.
        problems: complaints of the lenient parse: misplaced tags, text where a tag must stand.
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
        """The facts of one trace.

        Args:
            sampled: which tokens the policy drew. A path or summary that the engine had to close is then
                none of the policy's merit, and its block not well formed. None: a text, taken as it is.
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
        """Any block at all, well formed or not: what the parallel ratio counts."""
        return self.blocks > 0

    @property
    def well_formed(self) -> bool:
        """The trace passes the format check."""
        return self.parallel and self.well_formed_blocks == self.blocks and not self.problems


def _well_formed(block: Block, sampled: Sequence[bool] | None) -> bool:
    if not block.well_formed or sampled is None:
        return block.well_formed
    return all(sampled[part.stop - 1] for part in (*block.paths, block.summary))


def well_formed_parallel(tree: Tree) -> bool:
    """Whether a trace passes the format check; False for one without blocks."""
    return Format.of(tree).well_formed
