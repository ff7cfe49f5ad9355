"""The difference between the sibling paths of a trace.

The difference of two paths is the Bray–Curtis dissimilarity of their token bigrams (one minus their
Sørensen–Dice similarity, with multiplicities):

    1 - 2 * sum over bigrams g of min(a[g], b[g]) / (sum of a + sum of b)

where a[g] counts the bigram g in one path, including the pair of "begin" and the first token, so that a path
of n tokens has n bigrams. Equal paths: 0. Paths without a common bigram, or one of them empty: 1. Two empty
paths: 0. The path's own tags do not count; those of blocks inside it do.

The difference of a block is the mean over its pairs, that of a trace the mean over its blocks of at least two
paths. The cost is (paths - 1) steps per token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations, pairwise
from statistics import fmean

from megatron_parallel_r1.thought.tree import Block, Path, Tree

BEGIN = -1
"""Not a token id; stands before the first token of a path."""


def path_difference(left: Sequence[int], right: Sequence[int]) -> float:
    """Returns the difference of two token sequences, 0..1."""
    return _difference(_bigrams(left), _bigrams(right))


def block_difference(tokens: Sequence[int], block: Block) -> float | None:
    """Returns the mean over the pairs of a block's paths; None for a single path."""
    bigrams = [_bigrams(tokens[start:stop]) for start, stop in map(content_span, block.paths)]
    return fmean(_difference(a, b) for a, b in combinations(bigrams, 2)) if len(bigrams) > 1 else None


def trace_difference(tokens: Sequence[int], tree: Tree) -> float | None:
    """Returns the mean over all blocks of a trace, nested ones included; None if none has two paths."""
    blocks = [block_difference(tokens, block) for _, block in tree.all_blocks()]
    known = [value for value in blocks if value is not None]
    return fmean(known) if known else None


def content_span(path: Path) -> tuple[int, int]:
    """Returns (start, stop) of the tokens between a path's tags."""
    return path.inside


def _bigrams(tokens: Sequence[int]) -> Counter[tuple[int, int]]:
    return Counter(pairwise((BEGIN, *tokens)))


def _difference(left: Counter[tuple[int, int]], right: Counter[tuple[int, int]]) -> float:
    total = left.total() + right.total()
    return 1.0 - 2.0 * (left & right).total() / total if total else 0.0
