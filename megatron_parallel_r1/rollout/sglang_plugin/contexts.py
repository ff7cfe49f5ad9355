"""Describes what a token of a trace with isolated blocks sees, as chains of SGLang's prefix cache.

The cache is a tree of token lists, under namespaces that do not touch. A chain is one list in one namespace.
The text before the first block and each of its paths are ordinary chains of the request's own namespace:

    base:       trunk path_1        trunk path_2        trunk path_3

The text after a block has seen all its paths, so the same tokens in another trace have other keys and values:
it is a chain in a namespace of its own, a digest of what was joined, and begins with `</Parallel>`. Only that
tail is stored there, so no slot has two owners. The paths of the next block branch off that chain, and so on:

    digest:     tail path_1         tail path_2
    digest':    tail'

The next token attends to the slots of the first path's whole chain, of each other path's chain from the fork
on, and of the tail. A path may itself hold closed blocks: its slots then lie in several chains too. Contexts
are built by the operations of the engine protocol (rollout/engine.py): write, fork (a value: just use it
twice) and join.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

from megatron_parallel_r1.rollout.joined_blocks import JoinedBlock, count_nested

TokenArray = array  # of type code "q", as SGLang has them


@dataclass(frozen=True, slots=True, eq=False)
class CacheContext:
    """Written tokens, with closed blocks among them.

    Attributes:
        namespace: of its chain; None is SGLang's own default.
        before: tokens of all slots before its chain, flat.
        tail: tokens of its chain.
        position: rotary position of the next token.
        pieces: where the slots of `before` lie, in order.
    """

    namespace: str | None
    before: TokenArray
    tail: TokenArray
    position: int
    pieces: tuple[ChainSpan, ...]

    @property
    def tokens(self) -> TokenArray:
        return self.before + self.tail

    @property
    def length(self) -> int:
        """Number of slots."""
        return len(self.before) + len(self.tail)

    @property
    def saved(self) -> int:
        """Slots minus positions: the tokens of all but the longest path of each block."""
        return self.length - self.position


@dataclass(frozen=True, slots=True, eq=False)
class ChainSpan:
    """Slots [lo, hi) of a context's chain. A context's pieces need each other context only once."""

    context: CacheContext
    lo: int
    hi: int


def context_of(tokens: TokenArray, blocks: Sequence[JoinedBlock], namespace: str | None) -> CacheContext:
    """The context after `tokens`.

    Args:
        blocks: all closed ones, checked (`joined_blocks.check_blocks`), in order of forks.
        namespace: of a request without blocks.
    """
    return _read(CacheContext(namespace, array("q"), array("q"), 0, ()), tokens, 0, len(tokens), blocks)


def _read(
    context: CacheContext, tokens: TokenArray, start: int, stop: int, blocks: Sequence[JoinedBlock]
) -> CacheContext:
    """Appends tokens[start:stop), with the blocks in it, to `context`."""
    while blocks:
        block, count = blocks[0], count_nested(blocks)
        trunk = _write(context, tokens[start : block.fork])
        inside = blocks[1 : 1 + count]
        paths = [
            _read(trunk, tokens, lo, hi, [other for other in inside if lo <= other.fork < hi])
            for lo, hi in block.paths
        ]
        context = _join(trunk, paths)
        start, blocks = block.stop, blocks[1 + count :]
    return _write(context, tokens[start:stop])


def _write(context: CacheContext, tokens: TokenArray) -> CacheContext:
    return replace(context, tail=context.tail + tokens, position=context.position + len(tokens))


def _join(trunk: CacheContext, paths: Sequence[CacheContext]) -> CacheContext:
    pieces = _slots(paths[0])
    before = paths[0].tokens
    for path in paths[1:]:
        pieces += _after(_slots(path), trunk.length)
        before += path.tokens[trunk.length :]
    return CacheContext(
        namespace=_digest(trunk, paths),
        before=before,
        tail=array("q"),
        position=max(path.position for path in paths),
        pieces=tuple(pieces),
    )


def _slots(context: CacheContext) -> list[ChainSpan]:
    return [*context.pieces, ChainSpan(context, 0, len(context.tail))]


def _after(pieces: Sequence[ChainSpan], count: int) -> list[ChainSpan]:
    """The spans without the first `count` slots."""
    left = []
    for piece in pieces:
        cut = min(count, piece.hi - piece.lo)
        count -= cut
        if piece.lo + cut < piece.hi:
            left.append(replace(piece, lo=piece.lo + cut))
    return left


def _digest(trunk: CacheContext, paths: Sequence[CacheContext]) -> str:
    """Identifies what was joined: where, and each path by the place of its last token in the cache."""
    digest = blake2b(repr((len(trunk.tail), len(paths))).encode(), digest_size=16)
    for path in paths:
        digest.update(repr((path.namespace, len(path.tail))).encode())
        digest.update(path.tail.tobytes())
    return f"parallel_r1:{digest.hexdigest()}"
