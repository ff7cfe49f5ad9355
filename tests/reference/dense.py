"""Who sees whom, from the definition of each mode: sets and recursion, no intervals.

The definitions read a trace as a chain of contexts. The context of a token is the list of trace indices
before it that its author could see, each with its position.
"""

from __future__ import annotations

import numpy as np

from megatron_parallel_r1.thought.packing import PackedRow
from megatron_parallel_r1.thought.tree import Block, Tree


def isolated_sees(tree: Tree) -> np.ndarray:
    """[q, k] bool: q sees an earlier k unless the two lie in different paths of one block."""
    apart = np.zeros((tree.length, tree.length), bool)
    for _, block in tree.all_blocks():
        for own in block.segments(tree.length):
            for other in block.segments(tree.length):
                if own != other:
                    apart[own[0] : own[1], other[0] : other[1]] = True
    return np.tril(np.ones_like(apart)) & ~apart


def isolated_position(tree: Tree) -> list[int]:
    """One more than the predecessor; a path's is the fork, `</Parallel>`'s is the furthest path end."""
    predecessors: dict[int, list[int]] = {}
    for _, block in tree.all_blocks():
        segments = block.segments(tree.length)
        for start, _stop in segments:
            predecessors[start] = [block.paths[0].start - 1]
        if block.end is not None:
            predecessors[block.end] = [stop - 1 for _start, stop in segments]
    positions: list[int] = []
    for index in range(tree.length):
        before = predecessors.get(index, [index - 1])
        positions.append(1 + max(positions[i] if i >= 0 else -1 for i in before))
    return positions


def stock_contexts(tree: Tree) -> list[list[int]]:
    """For each token the trace indices that a stock engine had in its prompt when it was sampled.

    A path is sampled behind the fork alone; all behind the block is sampled behind the flat text.
    """
    contexts: list[list[int]] = [[] for _ in range(tree.length)]

    def chain(start: int, stop: int, blocks: tuple[Block, ...], before: list[int]) -> None:
        cursor, seen = start, list(before)
        for block in blocks:
            for index in range(cursor, block.paths[0].start):
                contexts[index] = list(seen)
                seen.append(index)
            for path, (lo, hi) in zip(block.paths, block.segments(stop), strict=True):
                chain(lo, hi, path.blocks, seen)
                cursor = hi
            seen = seen + list(range(block.paths[0].start, cursor))
        for index in range(cursor, stop):
            contexts[index] = list(seen)
            seen.append(index)

    chain(0, tree.length, tree.blocks, [])
    return contexts


def row_sees(packed: PackedRow) -> np.ndarray:
    """[q, k] bool: the mask that the layout of a packed row stands for."""
    index_L, start_L, *hides = packed.layout_KL
    keys = np.arange(len(packed))
    sees = (start_L[:, None] <= keys) & (keys <= index_L[:, None])
    for lo_L, hi_L in zip(hides[::2], hides[1::2], strict=True):
        sees &= ~((lo_L[:, None] <= keys) & (keys < hi_L[:, None]))
    return sees
