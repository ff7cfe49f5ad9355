"""Traces of every format as text: canonical white space, and the tokens that an engine would write."""

from __future__ import annotations

import pytest

from megatron_parallel_r1.data.embedded.generate import build_tokenizer, cold_start_example
from megatron_parallel_r1.data.embedded.traces import TraceStyle
from megatron_parallel_r1.data.prompts import encode_response
from megatron_parallel_r1.data.tokenizers import train_tokenizer
from megatron_parallel_r1.data.trace_text import WrittenTrace, canonical, describe_fault
from megatron_parallel_r1.thought.formats import FORMATS, NPR
from megatron_parallel_r1.thought.parser import parse
from megatron_parallel_r1.thought.tokenizer import add_tags
from tests.reference.formats import ALL

STYLE = TraceStyle(sequential=0.0, paths=(1, 4))


@pytest.mark.parametrize("name", sorted(ALL))
@pytest.mark.parametrize("kind", ["words", "bytes"])
def test_sft_trains_the_tokens_that_an_engine_forces(name: str, kind: str) -> None:
    format = ALL[name]
    examples = [cold_start_example(STYLE, 0.5, 1, index, format) for index in range(12)]
    texts = [example.response for example in examples]
    # A tokenizer that likes to merge ": x" would split a forced text elsewhere than the engine does.
    tokenizer = build_tokenizer(format) if kind == "words" else train_tokenizer(texts, 300, format)
    tags = add_tags(tokenizer, format=format)
    counts = set()
    for text in texts:
        assert canonical(text, format) == text and describe_fault(text, format) is None
        tokens = encode_response(tokenizer, text, format)
        tree = parse(tokens, tags, strict=True)
        written = WrittenTrace.of(text, format=format)
        assert len(tree.blocks) == len(written.tree.blocks) > 0
        for block, spelled in zip(tree.blocks, written.tree.blocks, strict=True):
            counts.add(len(block.paths))
            for number, path in enumerate(block.paths, start=1):
                assert tuple(tokens[path.start : path.inside[0]]) == tags.path_begin(number)
            if kind == "bytes":
                first = tokenizer.decode(tokens[slice(*block.paths[0].inside)])
                assert first == written.inside(spelled.paths[0])
        assert kind == "words" or tokenizer.decode(tokens[:-1]) == text
    assert len(counts) >= 3


def test_white_space_becomes_the_formats() -> None:
    loose = (
        "a <guideline> <plan>1: b</plan>\n<plan>2: c</plan> </guideline><step> 1 : d </step>"
        "\n\n<step>\n2:e</step> <takeaway>  f </takeaway>\ng"
    )
    text = canonical(loose, NPR)
    assert text == (
        "a <guideline> <plan>1: b</plan>\n<plan>2: c</plan> </guideline>\n<step>\n1: d </step>"
        "\n<step>\n2:e</step>\n<takeaway>\nf </takeaway>\ng"
    )
    written = WrittenTrace.of(text, format=NPR)
    (block,) = written.tree.blocks
    assert [written.inside(path) for path in block.paths] == [" d ", "e"]
    assert written.inside(block.summary) == "f " and written.main == "a \n\ng"


def test_a_fault_is_quoted_in_its_place() -> None:
    text = "a<Parallel><Outlines><Outline>1: b</Outline></Outlines><Thread>2:c</Thread></Parallel>"
    fault = describe_fault(text, FORMATS["threadweaver"])
    assert fault is not None and fault.startswith("text where the format's text must follow <Thread>, after ")
    none = describe_fault("a<Parallel><Outlines></Outlines>b", FORMATS["threadweaver"])
    assert none == (
        "a plan of 0 items, where 1 to 8 can be, after 'a<Parallel><Outlines>', at '</Outlines>b'"
    )
