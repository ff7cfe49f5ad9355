from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_parallel_r1.thought.parser import ParseError, Parser, ParserState, parse
from megatron_parallel_r1.thought.tree import Block, ParseProblem, Path, Summary
from tests.reference.traces import TAGS, random_trace

NAMES = {
    "P": TAGS.parallel, "/P": TAGS.parallel_end, "p": TAGS.path, "/p": TAGS.path_end,
    "S": TAGS.summary, "/S": TAGS.summary_end, "$": TAGS.eos, "t": 9,
}  # fmt: skip


def tokens(spelled: str) -> list[int]:
    return [NAMES[name] for name in spelled.split()]


def test_one_block_by_hand() -> None:
    tree = parse(tokens("t P p t /p p /p /P S t /S t $"), TAGS, strict=True)
    paths = (Path(2, 5, True), Path(5, 7, True))
    assert tree.blocks == (Block(1, paths, 7, Summary(8, 11, True)),)
    assert tree.problems == () and tree.length == 13
    assert tree.blocks[0].well_formed and tree.depth == 1
    assert tree.forced() == {2, 5, 7, 8}


def test_nesting_by_hand() -> None:
    tree = parse(tokens("P p t P p /p p t /p /P S /S /p p /p /P S /S"), TAGS, strict=True)
    inner = Block(3, (Path(4, 6, True), Path(6, 9, True)), 9, Summary(10, 12, True))
    outer = Block(0, (Path(1, 13, True, (inner,)), Path(13, 15, True)), 15, Summary(16, 18, True))
    assert tree.blocks == (outer,)
    assert [depth for depth, _ in tree.all_blocks()] == [0, 1]


@pytest.mark.parametrize(
    ("spelled", "index", "what"),
    [
        ("t /p", 1, "</Path> inside the main text"),
        ("P t", 1, "text between the paths of a block"),
        ("P /P", 1, "</Parallel> of a block without paths"),
        ("P p t S", 3, "<Summary> inside a path"),
        ("P p p", 2, "<Path> inside a path"),
        ("P p /p /P t", 4, "text where <Summary> must follow </Parallel>"),
        ("P p /p /P S P", 5, "<Parallel> inside a summary"),
        ("P p t", 3, "the trace ends inside a path"),
        ("P p /p /P", 4, "the trace ends inside a block, before its <Summary>"),
    ],
)
def test_malformed_names_the_token(spelled: str, index: int, what: str) -> None:
    with pytest.raises(ParseError) as error:
        parse(tokens(spelled), TAGS, strict=True)
    assert (error.value.index, error.value.what) == (index, what)
    lenient = parse(tokens(spelled), TAGS)
    assert lenient.length == len(spelled.split())
    if not what.startswith("the trace ends"):
        assert lenient.problems[0] == ParseProblem(index, what)


def test_truncation_leaves_open_ends() -> None:
    tree = parse(tokens("P p t /p p t P p t"), TAGS)
    inner = Block(6, (Path(7, 9, False),), None, None)
    assert tree.blocks == (Block(0, (Path(1, 4, True), Path(4, 9, False, (inner,))), None, None),)
    assert tree.problems == ()
    summary = parse(tokens("P p /p /P S t"), TAGS).blocks[0].summary
    assert summary == Summary(4, 6, closed=False)
    assert parse(tokens("t P"), TAGS).blocks == ()


def test_a_block_without_summary_ends_where_text_goes_on() -> None:
    tree = parse(tokens("P p /p p P p /p /P /p /P S /S"), TAGS)
    (outer,) = tree.blocks
    assert outer.paths[1].blocks[0].summary is None and outer.paths[1].closed
    assert outer.summary == Summary(10, 12, True)
    assert [problem.index for problem in tree.problems] == [8]


@given(st.integers(0, 10**6), st.booleans())
def test_feeding_token_by_token_equals_parsing_each_prefix(seed: int, truncate: bool) -> None:
    trace = random_trace(seed, truncate=truncate)
    parser = Parser(TAGS, strict=True)
    for count, token in enumerate(trace, start=1):
        parser.feed(token)
        assert parser.tree() == parse(trace[:count], TAGS)
    if not truncate:
        assert parser.state is ParserState.TEXT and parser.depth == 0
        assert parse(trace, TAGS, strict=True) == parser.tree()


@given(st.lists(st.integers(0, 8), max_size=40))
def test_any_token_list_parses_leniently_and_strictly_only_without_problems(
    trace: list[int],
) -> None:
    tree = parse(trace, TAGS)
    assert tree.length == len(trace)
    for _, block in tree.all_blocks():
        assert all(lo < hi for lo, hi in block.segments(len(trace)))
    try:
        assert parse(trace, TAGS, strict=True) == tree
        assert not tree.problems
    except ParseError as error:
        assert error.index == (tree.problems[0].index if tree.problems else len(trace))
