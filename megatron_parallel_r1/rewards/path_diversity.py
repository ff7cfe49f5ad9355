"""How much the sibling paths of a trace differ.

The difference of two paths is the Bray–Curtis dissimilarity of their token bigrams (one minus their
Sørensen–Dice similarity, with multiplicities):

    1 - 2 * sum over bigrams g of min(a[g], b[g]) / (sum of a + sum of b)

where a[g] counts the bigram g in one path, the pair of "begin" and its first token included, so that a path
of n tokens has n bigrams. Equal paths: 0. Paths without a common bigram, or one empty: 1. Two empty ones: 0.
The tags of the path do not count; those of blocks inside it do.

A block's difference is the mean over its pairs, a trace's the mean over its blocks of two paths or more. It
costs (paths - 1) steps a token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations, pairwise
from statistics import fmean

from megatron_parallel_r1.thought.tree import Block, Path, Tree

BEGIN = -1
"""No token id; stands before a path's first token."""


def difference(one: Sequence[int], other: Sequence[int]) -> float:
    """Of two token sequences, 0..1."""
    return _difference(_bigrams(one), _bigrams(other))


def block_difference(tokens: Sequence[int], block: Block) -> float | None:
    """Mean over the pairs of a block's paths; None where it has one path only."""
    bigrams = [_bigrams(tokens[start:stop]) for start, stop in map(content, block.paths)]
    return fmean(_difference(a, b) for a, b in combinations(bigrams, 2)) if len(bigrams) > 1 else None


def trace_difference(tokens: Sequence[int], tree: Tree) -> float | None:
    """Mean over the trace's blocks, nested ones too; None where none has two paths."""
    blocks = [block_difference(tokens, block) for _, block in tree.all_blocks()]
    known = [value for value in blocks if value is not None]
    return fmean(known) if known else None


def content(path: Path) -> tuple[int, int]:
    """Where a path's text lies between its tags, as (start, stop)."""
    return path.start + 1, path.stop - path.closed


def _bigrams(tokens: Sequence[int]) -> Counter[tuple[int, int]]:
    return Counter(pairwise((BEGIN, *tokens)))


def _difference(one: Counter[tuple[int, int]], other: Counter[tuple[int, int]]) -> float:
    total = one.total() + other.total()
    return 1.0 - 2.0 * (one & other).total() / total if total else 0.0
