"""Generated traces: well-formed for the project's parser, and right in every word."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_parallel_r1.data.embedded.congruence import Congruence
from megatron_parallel_r1.data.embedded.generate import (
    arithmetic_example,
    build_tokenizer,
    cold_start_example,
)
from megatron_parallel_r1.data.embedded.traces import TraceStyle, stated_result
from megatron_parallel_r1.data.trace_text import canonical
from megatron_parallel_r1.thought.parser import parse
from megatron_parallel_r1.thought.tokenizer import add_tags
from tests.unit.data.posed import read

TOKENIZER = build_tokenizer()
TAGS = add_tags(TOKENIZER)

weights = st.lists(st.floats(0.01, 1), min_size=1, max_size=6).map(tuple)
styles = st.builds(
    TraceStyle,
    sequential=st.floats(0, 1),
    paths=st.tuples(st.integers(1, 4), st.integers(4, 8)),
    tries=weights,
    sequential_tries=weights,
    blocks=st.integers(1, 4),
    again=st.floats(0, 1),
    guess=st.floats(0, 1),
    good=st.floats(0, 1),
)


def check_tries(congruence: Congruence, words: list[str]) -> list[int]:
    """Asserts that a search is nothing but right tries of different values, an end, and returns the tries."""
    tries: list[int] = []
    while words and words[0].startswith("x="):
        x = int(words[0].removeprefix("x="))
        attempt = congruence.attempt(x)
        assert words[: len(attempt)] == attempt
        tries.append(x)
        words = words[len(attempt) :]
    assert len(set(tries)) == len(tries)
    *early, last = tries
    assert not set(early) & set(congruence.roots)
    assert words == ([f"found={last}"] if last in congruence.roots else ["none"])
    return tries


@settings(max_examples=150, deadline=None)
@given(style=styles, easy=st.floats(0, 1), seed=st.integers(0, 2**32), index=st.integers(0, 10**6))
def test_cold_start_traces(style: TraceStyle, easy: float, seed: int, index: int) -> None:
    example = cold_start_example(style, easy, seed, index)
    assert example == cold_start_example(style, easy, seed, index)
    congruence = read(example.problem.prompt)
    ids = TOKENIZER.encode(example.response)
    assert TOKENIZER.unk_token_id not in ids
    tree = parse(ids, TAGS, strict=True)

    words = TOKENIZER.convert_ids_to_tokens(ids)
    assert words[0] == f"need={congruence.need}"
    assert words[-3:-1] == ["Final", "Answer:"]
    stated: list[str] = []
    for block in tree.blocks:
        assert style.paths[0] <= len(block.paths) <= style.paths[1]
        searches = [words[path.start + 1 : path.stop - 1] for path in block.paths]
        for search in searches:
            check_tries(congruence, search)
        summary = words[block.summary.start + 1 : block.summary.stop - 1]
        found = [search[-1] for search in searches if search[-1] != "none"]
        assert len(summary) == 1 and summary[0] in (found or ["none"])
        stated.append(summary[0])
    assert len(tree.blocks) <= style.blocks
    assert all(result == "none" for result in stated[:-1])
    if not tree.blocks:
        check_tries(congruence, words[1:-3])
        stated.append(words[-4])
    if stated[-1] != "none":
        assert words[-1] == stated_result(stated[-1])
        assert words[-1] in example.problem.answers
    elif style.guess == 0:
        assert words[-1] == "none"


@given(easy=st.floats(0, 1), seed=st.integers(0, 2**32), index=st.integers(0, 10**6))
def test_drills_are_right_and_have_no_tags(easy: float, seed: int, index: int) -> None:
    example = arithmetic_example(easy, seed, index)
    congruence = read(example.problem.prompt)
    assert "<" not in example.response
    words = example.response.split()
    assert TOKENIZER.unk_token_id not in TOKENIZER.encode(example.response)
    assert words.pop(0) == f"need={congruence.need}"
    if "Answer:" in words:
        assert words[-3:-1] == ["Final", "Answer:"]
        check_tries(congruence, words[:-3])
        assert words[-1] in (*example.problem.answers, "none")
        return
    while words:
        attempt = congruence.attempt(int(words[0].removeprefix("x=")))
        assert words[: len(attempt)] == attempt
        words = words[len(attempt) :]


def test_style_sets_the_shares() -> None:
    style = TraceStyle(sequential=0.25, tries=(1.0,), again=0.0, good=0.0)
    texts = [cold_start_example(style, 0.0, 0, index).response for index in range(800)]
    blocks = [text for text in texts if "<Parallel>" in text]
    assert abs(len(blocks) / len(texts) - 0.75) < 0.05
    assert all(text.count(" x=") == text.count("<Path>") for text in blocks)
    good = TraceStyle(good=1.0)
    solved = [cold_start_example(good, 0.5, 0, index) for index in range(50)]
    assert all(example.response.split()[-1] in example.problem.answers for example in solved)


@pytest.mark.parametrize(
    "wrong",
    [{"sequential": 1.5}, {"paths": (3, 2)}, {"paths": (0, 2)}, {"tries": ()}, {"blocks": 0}],
)
def test_a_style_that_cannot_be_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(wrong))}( is |\n.*(greater|less) than or equal to 1)"):
        TraceStyle(**wrong)


@given(st.integers(0, 10**6))
def test_text_and_tokens_round_trip(index: int) -> None:
    example = cold_start_example(TraceStyle(sequential=0.3), 0.3, 7, index)
    for text in (example.problem.prompt, example.response):
        ids = TOKENIZER.encode(text)
        spaced = text.replace("<", " <").replace(">", "> ").split()
        assert len(ids) == len(spaced)
        assert canonical(TOKENIZER.decode(ids)) == text


def test_stated_result() -> None:
    assert stated_result("x=5 ax=2 no found=7 </Path>") == "7"
    assert stated_result("x=5 ax=2 no none") is None
    assert stated_result(" ".join(f"found={n}" for n in random.Random(0).sample(range(13), 5))) is not None
