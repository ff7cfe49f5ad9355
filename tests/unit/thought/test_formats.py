"""Every format of parallel thinking: parser and layout against traces written by its definition."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_parallel_r1.data.tokenizers import train_tokenizer
from megatron_parallel_r1.thought.formats import (
    FORMATS,
    MULTIVERSE,
    NPR,
    PARALLEL_R1,
    THREADWEAVER,
    PlanSection,
)
from megatron_parallel_r1.thought.layout import lay_out, row_length
from megatron_parallel_r1.thought.packing import concatenate
from megatron_parallel_r1.thought.parser import ParseError, Parser, ParserState, parse, planned_paths
from megatron_parallel_r1.thought.tags import Tags
from megatron_parallel_r1.thought.tokenizer import add_tags
from tests.reference.dense import row_sees
from tests.reference.formats import ALL, WrittenTrace, tags_of, write_trace

PROMPT = [20, 21, 22]
seeds, names = st.integers(0, 10**6), st.sampled_from(sorted(ALL))


def cut_trace(name: str, seed: int, cut: int | None, refuse: bool = False) -> WrittenTrace:
    written = write_trace(ALL[name], seed, refuse=refuse)
    return written if cut is None else written.cut(written.cuts[cut % len(written.cuts)])


@given(names, seeds, st.none() | st.integers(0, 10**6), st.booleans())
def test_the_layout_is_the_definition_of_the_format(
    name: str, seed: int, cut: int | None, refuse: bool
) -> None:
    written = cut_trace(name, seed, cut, refuse)
    tree = parse(written.tokens, written.tags)
    forced = [index for index, flag in enumerate(written.forced) if flag]
    assert sorted(tree.forced()) == forced
    sampled = [not flag for flag in written.forced]
    isolated, replay = (
        concatenate([lay_out(PROMPT, written.tokens, sampled, tree, mode)], [0])
        for mode in ("isolated", "replay")
    )
    assert isolated.positions_L[3:].tolist() == [3 + position for position in written.positions]
    for index, row in enumerate(row_sees(isolated)[3:]):
        assert np.flatnonzero(row).tolist() == [0, 1, 2, *(3 + k for k in written.sees[index]), 3 + index]
    assert len(replay) == row_length(3, tree, "replay")
    sources = replay.source_L[replay.source_L >= 0].tolist()
    assert sorted(sources) == [index for index, flag in enumerate(sampled) if flag]
    sees = row_sees(replay)
    for index in np.flatnonzero(replay.source_L >= 0):
        seen, source = np.flatnonzero(sees[index]), replay.source_L[index]
        assert replay.tokens_L[seen].tolist() == [
            *PROMPT,
            *(written.tokens[k] for k in written.stock[source]),
        ]
        assert replay.positions_L[seen].tolist() == list(range(len(seen)))


@given(names, seeds)
def test_a_strict_parse_reads_the_number_of_paths_from_the_plan(name: str, seed: int) -> None:
    written = write_trace(ALL[name], seed)
    parser = Parser(written.tags, strict=True)
    for count, token in enumerate(written.tokens, start=1):
        parser.feed(token)
        if count % 17 == seed % 17:
            assert parser.tree() == parse(written.tokens[:count], written.tags)
    assert parser.state is ParserState.TEXT
    tree = parser.tree()
    counts = [len(block.paths) for _, block in tree.all_blocks()]
    assert sorted(counts) == sorted(written.paths)
    for _, block in tree.all_blocks():
        assert block.planned == (len(block.paths) if ALL[name].plan else None)
        assert block.well_formed == (len(block.paths) > 1)


@given(st.data(), names)
def test_any_token_list_parses(data: st.DataObject, name: str) -> None:
    tags = tags_of(ALL[name])
    trace = data.draw(st.lists(st.sampled_from([*tags.ids, *range(13, 18)]), max_size=40))
    tree = parse(trace, tags)
    assert tree.length == len(trace)
    for _, block in tree.all_blocks():
        assert all(lo < hi for lo, hi in block.segments(len(trace)))
    for mode in ("isolated", "replay"):
        lay_out(PROMPT, trace, [index not in tree.forced() for index in range(len(trace))], tree, mode)
    try:
        assert parse(trace, tags, strict=True) == tree
        assert not tree.problems
    except ParseError as error:
        assert error.index == (tree.problems[0].index if tree.problems else len(trace))


def spelled(format_name: str, text: str) -> tuple[list[int], Tags]:
    tags = tags_of(FORMATS[format_name])
    ids = dict(zip(tags.format.tags, tags.ids, strict=True))
    characters = {char: id for piece, tokens in tags.texts for char, id in zip(piece, tokens, strict=True)}
    pieces = tags.format.split(text)
    tokens = [([ids[p]] if p in ids else [characters.get(char, 30) for char in p]) for p in pieces]
    return [token for piece in tokens for token in piece], tags


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("parallel_r1", "a<Parallel><Path>b</Path><Path>c</Path></Parallel><Summary>d</Summary>e"),
        (
            "multiverse",
            "a<Parallel><Goal><Outline>1: b</Outline>\n<Outline>2: c</Outline></Goal><Path>1:d</Path>"
            "<Path>2:e</Path><Conclusion>f</Conclusion></Parallel>g",
        ),
        (
            "npr",
            "a<guideline><plan>1: b</plan><plan>2: c</plan></guideline>\n<step>\n1:d</step>\n<step>\n2:e"
            "</step>\n<takeaway>\nf</takeaway>g",
        ),
        (
            "threadweaver",
            "a<Parallel><Outlines><Outline>1: b</Outline><Outline>2: c</Outline></Outlines><Thread>1:d"
            "</Thread><Thread>2:e</Thread></Parallel>g",
        ),
    ],
)
def test_a_published_block_by_hand(name: str, text: str) -> None:
    tokens, tags = spelled(name, text)
    tree = parse(tokens, tags, strict=True)
    (block,) = tree.blocks
    assert len(block.paths) == 2 and block.well_formed
    assert [tokens[slice(*path.inside)] for path in block.paths] == [[30], [30]]
    assert (block.summary is None) == (name == "threadweaver")
    spans = [tokens[start:stop] for start, stop in tree.main_spans()]
    assert spans == [[30], [30]]


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("npr", "<guideline></guideline>", "a plan of 0 items, where 1 to 5 can be"),
        (
            "npr",
            "<guideline>" + "<plan>a</plan>" * 6 + "</guideline>",
            "a plan of 6 items, where 1 to 5 can be",
        ),
        ("npr", "<guideline><plan>a</guideline>", "</guideline> inside an item of a plan"),
        (
            "npr",
            "<guideline><plan>a</plan></guideline><step>\n1:b",
            "<step> without the text that must stand",
        ),
        (
            "npr",
            "<guideline><plan>a</plan></guideline>\n<step>\n2:b",
            "text where the format's text must follow <step>",
        ),
        ("multiverse", "<Parallel><Outline>a", "<Outline> inside a block, before its plan"),
        (
            "multiverse",
            "<Parallel><Goal><Outline>a</Outline><Outline>b</Outline></Goal><Path>1:c</Path><Conclusion>",
            "<Conclusion> after 1 of 2 planned paths",
        ),
        (
            "multiverse",
            "<Parallel><Goal><Outline>a</Outline></Goal><Path>1:b</Path><Path>2:c</Path><Conclusion>",
            "path 2 of a plan of 1",
        ),
        (
            "multiverse",
            "<Parallel><Goal><Outline>a</Outline></Goal><Path>1:b</Path><Conclusion>c</Conclusion>d",
            "text where </Parallel> must follow </Conclusion>",
        ),
        (
            "threadweaver",
            "<Parallel><Outlines><Outline>a</Outline></Outlines>",
            "the trace ends inside a block, outs",
        ),
    ],
)
def test_a_malformed_plan_or_forced_text_is_named(name: str, text: str, what: str) -> None:
    tokens, tags = spelled(name, text)
    with pytest.raises(ParseError) as error:
        parse(tokens, tags, strict=True)
    assert error.value.what.startswith(what)


def test_a_plan_says_how_many_paths() -> None:
    for count in range(8):
        tokens, tags = spelled("npr", "<guideline>a" + "<plan>b</plan>" * count + "c</guideline>")
        assert planned_paths(tokens, tags) == (count if 1 <= count <= 5 else None)
        assert planned_paths(tokens[:-1], tags) is None


def test_a_path_that_ends_in_its_plan_closes_the_path() -> None:
    text = "<guideline><plan>a</plan></guideline>\n<step>\n1:b<guideline><plan>c</step>"
    text += "\n<takeaway>\nd</takeaway>"
    tokens, tags = spelled("npr", text)
    tree = parse(tokens, tags)
    (block,) = tree.blocks
    assert block.paths[0].closed and not block.paths[0].blocks and block.summary is not None
    assert [problem.what for problem in tree.problems] == ["</step> inside an item of a plan"]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"path": "<Parallel>"}, "the tag <Parallel> is part of <Parallel>"),
        ({"path": "<Conclusion"}, "the tag <Conclusion is part of <Conclusion>"),
        ({"path": " <Path>"}, "is no tag"),
        ({"path_begin": "{number}:"}, "path_begin '{number}:' must be <Path> with text behind it"),
        ({"path_begin": "Now <Path>"}, "must be <Path>"),
        ({"path_begin": "<Path>{number}{number}"}, "more than one {number}"),
        ({"summary_end": None}, "set both of summary and summary_end"),
        ({"joined": "then <Conclusion>"}, "white space around them"),
        ({"joined": "</Goal>"}, "must hold close"),
        ({"behind": ""}, "must hold close"),
        ({"max_paths": 9}, "max_paths is 9; give 1 to 8"),
        (
            {"plan": PlanSection("<Outline>", "<Outline>", "</Goal>")},
            "the tag <Outline> is part of <Outline>",
        ),
    ],
)
def test_a_format_that_contradicts_itself_is_refused(changes: dict[str, object], what: str) -> None:
    with pytest.raises(ValueError, match="format multiverse: ") as error:
        replace(MULTIVERSE, **changes)
    assert what in str(error.value)


def test_the_tags_of_each_format_are_single_tokens() -> None:
    for format in FORMATS.values():
        tokenizer = train_tokenizer(["1: one plus one is two\n", "2: two views of it\n"], vocab_size=280)
        tags = add_tags(tokenizer, format=format)
        assert tags == Tags.of(tokenizer, format=format) and len(tags.ids) == len(format.tags)
        for number in range(1, 9):
            assert tokenizer.decode(tags.path_begin(number)) == format.begin_of(number)
        assert tokenizer.decode(tags.joined + tags.behind) == format.joined + format.behind


def test_parallel_r1_has_the_six_tags_in_their_order() -> None:
    assert PARALLEL_R1.tags == (
        "<Parallel>", "</Parallel>", "<Path>", "</Path>", "<Summary>", "</Summary>",
    )  # fmt: skip
    assert not list(PARALLEL_R1.plain_pieces()) and PARALLEL_R1.fork == "<Parallel>"
    assert THREADWEAVER.fork == "</Outlines>" and NPR.fork == "</guideline>"
