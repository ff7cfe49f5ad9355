"""The layout: for each token of a row, its position and the tokens that it may see, in O(L) integers.

In a packed row, query q sees key k iff

    doc_start[q] <= k <= q   and, for each level d,   not (hide_lo[d, q] <= k < hide_hi[d, q])

Causal order plus hidden intervals describe every mode:

- `isolated`: a token of path i hides [start of the block's first path, start of path i); each nesting
  level adds an interval. Positions restart after `<Parallel>` in each path, and `</Parallel>` continues
  after the longest path.
- `replay`: the flat trace, followed by a branch for each path that an engine sampled in another context than
  the flat one (all but the first path of a block). A branch sees the row up to its fork, and itself. Its copy
  in the flat part carries no loss. So every sampled token is trained in the context in which a stock engine
  sampled it.
- `causal`: the flat trace; each path sees its earlier siblings. `sequential`: a trace without blocks.

In each mode a token with loss is predicted at the index just before it, since every segment begins with a
token that the engine forced.

Shapes: L tokens of a row, D hidden intervals per token, K = 2 + 2 D rows of the layout tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_parallel_r1.thought.tree import Block, Path, Tree

Mode = Literal["isolated", "replay", "causal", "sequential"]
Int32 = NDArray[np.int32]
TokenIds = Sequence[int] | Int32
TokenFlags = Sequence[bool] | NDArray[np.bool_]


@dataclass(frozen=True, eq=False, slots=True)
class Row:
    """One laid-out trace.

    Attributes:
        tokens_L: token ids.
        positions_L: rotary positions.
        hide_lo_DL, hide_hi_DL: hidden intervals in row indices; an unused level has lo == hi.
        source_L: for a token that carries loss, its index in the trace's response, else -1.
    """

    tokens_L: Int32
    positions_L: Int32
    hide_lo_DL: Int32
    hide_hi_DL: Int32
    source_L: Int32

    def __post_init__(self) -> None:
        length = len(self.tokens_L)
        assert self.positions_L.shape == self.source_L.shape == (length,)
        assert self.hide_lo_DL.shape == self.hide_hi_DL.shape == (len(self.hide_lo_DL), length)
        assert length == 0 or self.source_L[0] < 0, "nothing predicts the first token of a row"

    def __len__(self) -> int:
        return len(self.tokens_L)


def lay_out(
    prompt: TokenIds,
    tokens: TokenIds,
    sampled: TokenFlags,
    tree: Tree,
    mode: Mode,
) -> Row:
    """Lays out one trace as a row.

    Args:
        prompt: token ids before the response, at least one.
        tokens: token ids of the flat response, parsed as `tree`.
        sampled: which of `tokens` carry loss.
        mode: the visibility of siblings.

    Raises:
        ValueError: a trace with blocks in `sequential` mode, an empty prompt, or different lengths.
    """
    if not len(prompt) or not len(tokens) == len(sampled) == tree.length:
        raise ValueError(
            f"a row needs a prompt and equal lengths, got a prompt of {len(prompt)}, {len(tokens)} tokens, "
            f"{len(sampled)} flags and a tree of {tree.length}"
        )
    if mode == "sequential" and tree.blocks:
        raise ValueError(f"a sequential trace has no blocks, this one has {len(tree.blocks)}")
    if mode == "isolated":
        return _isolated(prompt, tokens, sampled, tree)
    if mode == "replay":
        return _replay(prompt, tokens, sampled, tree)
    return _flat(prompt, tokens, sampled)


def row_length(prompt_length: int, tree: Tree, mode: Mode) -> int:
    """Returns the length of the row of `lay_out`."""
    return prompt_length + tree.length + (_branch_tokens(tree.blocks) if mode == "replay" else 0)


def _branch_tokens(blocks: tuple[Block, ...]) -> int:
    """Tokens of all branches of `blocks`, nested ones included."""
    return sum(
        _branch_tokens(path.blocks) + (path.stop - path.start if number else 0)
        for block in blocks
        for number, path in enumerate(block.paths)
    )


def isolated_positions(tree: Tree) -> Int32:
    """Returns the positions of the response's tokens in `isolated` mode, from 0."""
    positions = np.zeros(tree.length, np.int32)
    _assign_positions(positions, 0, tree.length, tree.blocks, 0)
    return positions


def critical_length(tree: Tree) -> int:
    """Returns the number of tokens on the critical path: of each block only the longest path counts."""
    return int(isolated_positions(tree).max(initial=-1)) + 1


def _assign_positions(positions: Int32, start: int, stop: int, blocks: tuple[Block, ...], first: int) -> int:
    """Numbers [start, stop) from `first`; returns the position after it."""
    for block in blocks:
        fork = block.paths[0].start
        positions[start:fork] = np.arange(first, first + fork - start)
        first += fork - start
        after = first
        for path, (lo, hi) in zip(block.paths, block.segments(stop), strict=True):
            after = max(after, _assign_positions(positions, lo, hi, path.blocks, first))
            start = hi
        first = after
    positions[start:stop] = np.arange(first, first + stop - start)
    return first + stop - start


def _isolated(prompt: TokenIds, tokens: TokenIds, sampled: TokenFlags, tree: Tree) -> Row:
    row = _flat(prompt, tokens, sampled)
    offset = len(prompt)
    row.positions_L[offset:] = offset + isolated_positions(tree)
    hide_lo_DL = np.zeros((tree.depth, len(row)), np.int32)
    hide_hi_DL = np.zeros_like(hide_lo_DL)
    for depth, block in tree.all_blocks():
        for lo, hi in block.segments(tree.length):
            hide_lo_DL[depth, offset + lo : offset + hi] = offset + block.paths[0].start
            hide_hi_DL[depth, offset + lo : offset + hi] = offset + lo
    return Row(row.tokens_L, row.positions_L, hide_lo_DL, hide_hi_DL, row.source_L)


def _flat(prompt: TokenIds, tokens: TokenIds, sampled: TokenFlags) -> Row:
    tokens_L = np.concatenate([np.asarray(prompt, np.int32), np.asarray(tokens, np.int32)])
    source_L = np.full(len(tokens_L), -1, np.int32)
    source_L[len(prompt) :] = np.where(sampled, np.arange(len(tokens)), -1)
    nothing_DL = np.zeros((0, len(tokens_L)), np.int32)
    positions_L = np.arange(len(tokens_L), dtype=np.int32)
    return Row(tokens_L, positions_L, nothing_DL, nothing_DL, source_L)


@dataclass(frozen=True, slots=True)
class _Branch:
    """A path repeated at row index `start`; its first token has position `position`."""

    path: Path
    start: int
    position: int
    hides: tuple[tuple[int, int], ...]


def _replay(prompt: TokenIds, tokens: TokenIds, sampled: TokenFlags, tree: Tree) -> Row:
    flat = _flat(prompt, tokens, sampled)
    branches: list[_Branch] = []
    end = len(flat)

    def collect(
        blocks: tuple[Block, ...], shift: int, climb: int, hides: tuple[tuple[int, int], ...]
    ) -> None:
        """Collects branches of `blocks`: row index = trace index + shift, position = row index + climb."""
        nonlocal end
        for block in blocks:
            collect(block.paths[0].blocks, shift, climb, hides)
            fork = block.paths[0].start - 1 + shift
            for path in block.paths[1:]:
                start, position = end, fork + climb + 1
                end += path.stop - path.start
                inside = (*hides, (fork + 1, start))
                branches.append(_Branch(path, start, position, inside))
                collect(path.blocks, start - path.start, position - start, inside)

    collect(tree.blocks, len(prompt), 0, ())

    levels = max((len(branch.hides) for branch in branches), default=0)
    row = Row(
        tokens_L=np.concatenate([flat.tokens_L, np.zeros(end - len(flat), np.int32)]),
        positions_L=np.concatenate([flat.positions_L, np.zeros(end - len(flat), np.int32)]),
        hide_lo_DL=np.zeros((levels, end), np.int32),
        hide_hi_DL=np.zeros((levels, end), np.int32),
        source_L=np.full(end, -1, np.int32),
    )
    row.source_L[: len(flat)] = flat.source_L
    _mute_repeats(row.source_L, tree.blocks, len(prompt))
    for branch in branches:
        path, start = branch.path, branch.start
        stop = start + path.stop - path.start
        row.tokens_L[start:stop] = tokens[path.start : path.stop]
        row.positions_L[start:stop] = np.arange(branch.position, branch.position + stop - start)
        for level, (lo, hi) in enumerate(branch.hides):
            row.hide_lo_DL[level, start:stop] = lo
            row.hide_hi_DL[level, start:stop] = hi
        kept = np.asarray(sampled[path.start : path.stop], bool)
        row.source_L[start:stop] = np.where(kept, np.arange(path.start, path.stop), -1)
        _mute_repeats(row.source_L, path.blocks, start - path.start)
    return row


def _mute_repeats(source_L: Int32, blocks: tuple[Block, ...], shift: int) -> None:
    """Removes the loss from paths that a branch repeats."""
    for block in blocks:
        _mute_repeats(source_L, block.paths[0].blocks, shift)
        for path in block.paths[1:]:
            source_L[path.start + shift : path.stop + shift] = -1
