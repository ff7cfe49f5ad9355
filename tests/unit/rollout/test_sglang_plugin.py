"""The SGLang plugin's own ideas, without SGLang: blocks on the wire, contexts, what is refused."""

from __future__ import annotations

import random
import subprocess
import sys
from array import array

import numpy as np
import pytest

from megatron_parallel_r1.rollout import sglang_plugin
from megatron_parallel_r1.rollout.joined_blocks import (
    FIELD,
    MAX_DEPTH,
    PROTOCOL,
    JoinedBlock,
    decode_blocks,
    encode_blocks,
    supports_joined_blocks,
)
from megatron_parallel_r1.rollout.sglang_plugin.contexts import CacheContext, context_of
from megatron_parallel_r1.thought.parser import parse
from megatron_parallel_r1.thought.tree import Tree
from tests.reference.dense import isolated_position, isolated_sees
from tests.reference.traces import TAGS, random_trace

SEEDS = range(60)


def trace_of(seed: int) -> tuple[Tree, tuple[JoinedBlock, ...]]:
    """A random trace of up to 8 paths and three levels behind one token of a prompt, and its blocks."""
    tokens = [TAGS.eos + 1, *random_trace(seed, most_paths=8 if seed % 3 else 3)]
    tree = parse(tokens, TAGS, strict=True)
    blocks = tuple(
        JoinedBlock(block.paths[0].start, tuple(path.stop for path in block.paths))
        for _, block in tree.all_blocks()
    )
    return tree, blocks


def sources(context: CacheContext) -> list[CacheContext]:
    return [piece.context for piece in context.pieces]


def test_blocks_come_as_they_went() -> None:
    seen = 0
    for seed in SEEDS:
        tree, blocks = trace_of(seed)
        assert decode_blocks(encode_blocks(blocks), tree.length) == blocks
        seen += len(blocks)
    assert seen > 100


@pytest.mark.parametrize(
    ("numbers", "length", "why"),
    [
        ("2", 9, "list of integers"),
        ([1, 2, 3.0], 9, "list of integers"),
        ([True, 2, 3], 9, "list of integers"),
        ([2, 3, 4], 9, "breaks off"),
        ([0, 3], 9, "breaks off"),
        ([-1], 9, "breaks off"),
        ([1, 0, 4], 9, "does not fit"),
        ([1, 3, 9], 9, "does not fit"),
        ([2, 3, 5, 5], 9, "empty path"),
        ([1, 3, 5, 1, 5, 6], 9, "does not fit"),
        ([1, 5, 6, 1, 2, 3], 9, "out of order"),
        ([2, 2, 5, 7, 1, 2, 3], 9, "does not fit"),
        ([2, 2, 5, 7, 1, 3, 5], 9, "does not fit"),
        ([2, 2, 5, 7, 2, 3, 4, 6], 9, "does not fit"),
    ],
)
def test_blocks_that_no_trace_can_have_are_refused(numbers: object, length: int, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        decode_blocks(numbers, length)


def nest(depth: int) -> tuple[list[int], int]:
    """Blocks of one path, each in the path of the one before, on the wire; and how long their text is."""
    length = 2 * depth + 2
    return encode_blocks([JoinedBlock(1 + level, (length - 1 - level,)) for level in range(depth)]), length


def test_blocks_in_blocks_are_read_up_to_a_depth_and_refused_above_it() -> None:
    numbers, length = nest(MAX_DEPTH)
    assert context_of(array("q", range(length)), decode_blocks(numbers, length), None).length == length
    for depth in (MAX_DEPTH + 1, 600, 5000):
        with pytest.raises(ValueError, match=f"more than {MAX_DEPTH} levels deep"):
            decode_blocks(*nest(depth))


def test_a_context_holds_what_its_last_token_sees() -> None:
    """Tokens are their own indices here, so slots tell whose keys and values they hold."""
    checked = 0
    for seed in SEEDS:
        tree, blocks = trace_of(seed)
        context = context_of(array("q", range(tree.length)), blocks, None)
        sees, positions = isolated_sees(tree), isolated_position(tree)
        for each in [context, *sources(context)]:
            last = each.tokens[-1]
            assert sorted(each.tokens) == list(np.flatnonzero(sees[last]))
            assert each.position == positions[last] + 1
            slots = [slot for piece in each.pieces for slot in piece.context.tail[piece.lo : piece.hi]]
            assert slots == list(each.before)
            assert set(sources(each)) <= set(sources(context))
            checked += 1
    assert checked > 300


def test_what_a_context_joins_comes_in_an_order_to_write_it_in() -> None:
    for seed in SEEDS:
        tree, blocks = trace_of(seed)
        written: set[CacheContext] = set()
        for each in sources(context_of(array("q", range(tree.length)), blocks, None)):
            assert set(sources(each)) <= written
            written.add(each)


def test_what_follows_a_block_is_shared_only_behind_the_same_block() -> None:
    tokens = array("q", range(10, 22))
    block = JoinedBlock(2, (5, 8))

    def namespace(
        tokens: array, blocks: tuple[JoinedBlock, ...] = (block,), base: str | None = None
    ) -> str | None:
        return context_of(tokens, blocks, base).namespace

    same = namespace(tokens)
    assert same == namespace(tokens[:9]) and same is not None
    others = [
        namespace(tokens, base="else"),
        namespace(tokens, (JoinedBlock(2, (4, 8)),)),
        namespace(tokens, ()),
    ]
    others += [
        namespace(tokens, (JoinedBlock(3, (5, 8)),)),
        namespace(tokens, (JoinedBlock(2, (5, 8)), JoinedBlock(9, (10,)))),
    ]
    for changed in range(8):
        altered = array("q", tokens)
        altered[changed] += 100
        others.append(namespace(altered))
    assert len({same, *others}) == 1 + len(others)


def test_siblings_share_their_trunk_and_later_blocks_their_summary() -> None:
    first, second = JoinedBlock(3, (5, 7, 9)), JoinedBlock(12, (14, 15))
    context = context_of(array("q", range(20)), (first, second), None)
    paths = sources(context)
    assert [each.namespace for each in paths[:3]] == [None] * 3
    assert [list(each.tail) for each in paths[:3]] == [[0, 1, 2, 3, 4], [0, 1, 2, 5, 6], [0, 1, 2, 7, 8]]
    assert paths[3].namespace == paths[4].namespace
    assert [list(each.tail) for each in paths[3:]] == [[9, 10, 11, 12, 13], [9, 10, 11, 14]]
    assert list(context.tail) == [15, 16, 17, 18, 19]
    # Of each block all but the longest path is saved: 2 + 2 of 2, 2, 2 and 1 of 2, 1.
    assert context.saved == 5


def test_many_blocks_are_read_in_linear_pieces() -> None:
    """Eight paths in each of four blocks in each path: contexts do not multiply from block to block."""
    rng, tokens, blocks = random.Random(0), [0], []
    for _ in range(4):
        fork, ends, inside = len(tokens), [], []
        for _ in range(8):
            tokens += [1]
            for _ in range(4):
                start = len(tokens)
                inner = [start + 2 * i for i in range(1, 9)]
                inside.append(JoinedBlock(start, tuple(inner)))
                tokens += [rng.randrange(9) for _ in range(16)] + [2]
            ends.append(len(tokens))
        blocks += [JoinedBlock(fork, tuple(ends)), *inside]
        tokens += [3, 4]
    assert decode_blocks(encode_blocks(blocks), len(tokens)) == tuple(blocks)
    context = context_of(array("q", tokens), blocks, None)
    assert len(context.pieces) == len(set(sources(context))) == 4 * 8 * (4 * 8 + 1)


@pytest.mark.parametrize(
    ("state", "whole"),
    [
        ({"protocol": PROTOCOL, "missing": []}, True),
        ({"protocol": PROTOCOL, "missing": ["a hook"]}, False),
        ({"protocol": PROTOCOL + 1, "missing": []}, False),
        (None, False),
    ],
)
def test_a_client_takes_joins_only_to_the_whole_plugin(state: dict | None, whole: bool) -> None:
    parameters = {} if state is None else {FIELD: state}
    good = {FIELD: {"protocol": PROTOCOL, "missing": []}}
    assert supports_joined_blocks({"internal_states": [parameters]}) is whole
    assert supports_joined_blocks({"internal_states": [good, parameters]}) is whole
    assert not supports_joined_blocks({"internal_states": []})
    assert not supports_joined_blocks({})


def test_it_is_off_unless_switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(env: object) -> None:
        raise AssertionError("switched on")

    monkeypatch.setattr(sglang_plugin, "require_tested", never)
    for plugins in (None, "", "other", "parallel_r1_cpu"):
        monkeypatch.delenv("SGLANG_PLUGINS", raising=False)
        if plugins is not None:
            monkeypatch.setenv("SGLANG_PLUGINS", plugins)
        sglang_plugin.register()
    monkeypatch.setenv("SGLANG_PLUGINS", "other, parallel_r1")
    with pytest.raises(AssertionError, match="switched on"):
        sglang_plugin.register()


def test_an_unknown_release_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for release in sglang_plugin.TESTED:
        monkeypatch.setattr(sglang_plugin, "version", lambda name, release=release: release)
        sglang_plugin.require_tested({})
    monkeypatch.setattr(sglang_plugin, "version", lambda name: "0.6.0")
    with pytest.raises(SystemExit, match=r"^parallel_r1: .*0\.6\.0.*PARALLEL_R1_ANY_SGLANG=1") as refused:
        sglang_plugin.require_tested({})
    assert "\n" not in str(refused.value)
    sglang_plugin.require_tested({"PARALLEL_R1_ANY_SGLANG": "1"})


def test_importing_it_loads_neither_torch_nor_sglang() -> None:
    modules = "sglang_plugin, sglang_plugin.contexts, joined_blocks"
    imports = "".join(f"import megatron_parallel_r1.rollout.{name.strip()}; " for name in modules.split(","))
    check = "import sys; sys.exit(bool({'torch', 'sglang'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", imports + check]).returncode == 0
