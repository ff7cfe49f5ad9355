"""Closed isolated blocks of a token list, and their format between a client and our SGLang plugin.

`POST /generate` carries the blocks as one flat list of integers, under a key that only the plugin reads. A
server without the plugin ignores it, so a client first checks `GET /server_info`:

    sampling_params.custom_params = {"parallel_r1": [n, fork, end_1 .. end_n,  n, fork, end_1 .. end_n, ...]}
    server_info["internal_states"][i]["parallel_r1"] = {"protocol": 1, "missing": [], "counters": {...}, ...}

Both ends import this file, so it imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FIELD = "parallel_r1"
PROTOCOL = 1
# Levels of nested blocks. Each level is a recursive call, here and in the plugin; past Python's own limit a
# server's scheduler would end. No trace comes near it.
MAX_DEPTH = 64


@dataclass(frozen=True, slots=True)
class JoinedBlock:
    """A closed block inside a token list whose paths did not see one another.

    Attributes:
        fork: index of the first token of the first path.
        ends: index after the last token of each path, increasing; the first path begins at `fork`, every
            other path where the previous one ends.
    """

    fork: int
    ends: tuple[int, ...]

    @property
    def stop(self) -> int:
        """Index after the last path."""
        return self.ends[-1]

    @property
    def paths(self) -> tuple[tuple[int, int], ...]:
        """Each path's first index and the index after its last."""
        return tuple(zip((self.fork, *self.ends[:-1]), self.ends, strict=True))


def encode_blocks(blocks: Sequence[JoinedBlock]) -> list[int]:
    """The value of `custom_params["parallel_r1"]`."""
    return [number for block in blocks for number in (len(block.ends), block.fork, *block.ends)]


def decode_blocks(numbers: object, length: int) -> tuple[JoinedBlock, ...]:
    """The blocks that `encode_blocks` wrote.

    Args:
        numbers: what came in `custom_params["parallel_r1"]`.
        length: of the token list.

    Raises:
        ValueError: not such a list, or blocks that no text of `length` tokens can have.
    """
    if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
        raise ValueError(f"{FIELD} must be a flat list of integers")
    blocks: list[JoinedBlock] = []
    at = 0
    while at < len(numbers):
        block = numbers[at + 1 : at + 2 + numbers[at]]
        if numbers[at] < 1 or len(block) != numbers[at] + 1:
            raise ValueError(f"{FIELD} breaks off: entry {at} announces {numbers[at]} paths")
        blocks.append(JoinedBlock(block[0], tuple(block[1:])))
        at += 2 + numbers[at]
    check_blocks(blocks, 0, length)
    return tuple(blocks)


def check_blocks(blocks: Sequence[JoinedBlock], start: int, stop: int, depth: int = 0) -> None:
    """Checks that a text [start, stop) can have these closed blocks, nested ones included, in order of forks.

    Each block has a token before and after it (its own tags) in its text or path, and no path is empty.

    Args:
        depth: number of blocks around the text.

    Raises:
        ValueError: it cannot.
    """
    if blocks and depth == MAX_DEPTH:
        raise ValueError(f"{FIELD}: blocks are nested more than {MAX_DEPTH} levels deep")
    while blocks:
        block, count = blocks[0], count_nested(blocks)
        inside = blocks[1 : 1 + count]
        increasing = all(lo < hi for lo, hi in block.paths)
        if not (increasing and start < block.fork and block.stop < stop):
            raise ValueError(
                f"{FIELD}: {block} does not fit between {start} and {stop}, or has an empty path"
            )
        if any(other.fork < block.fork for other in inside):
            raise ValueError(f"{FIELD}: blocks are out of order: one comes before the block at {block.fork}")
        for lo, hi in block.paths:
            check_blocks([other for other in inside if lo <= other.fork < hi], lo, hi, depth + 1)
        start, blocks = block.stop, blocks[1 + count :]


def count_nested(blocks: Sequence[JoinedBlock]) -> int:
    """How many blocks right after the first one lie inside it."""
    return next((i for i, other in enumerate(blocks[1:]) if other.fork >= blocks[0].stop), len(blocks) - 1)


def supports_joined_blocks(server_info: Mapping[str, Any]) -> bool:
    """Whether a server with this `GET /server_info` takes joined blocks: each of its schedulers runs the
    complete plugin with this file's protocol."""
    states = [state.get(FIELD, {}) for state in server_info.get("internal_states", [])]
    return bool(states) and all(
        state.get("protocol") == PROTOCOL and not state.get("missing") for state in states
    )
