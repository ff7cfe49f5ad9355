"""Text in pieces: half characters, blanks between words, stop sequences."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_parallel_r1.data.prompts import decode
from megatron_parallel_r1.data.tokenizers import train_tokenizer
from megatron_parallel_r1.serve.response_assembler import ResponseAssembler
from megatron_parallel_r1.serve.text import Detokenizer, StopCutter
from megatron_parallel_r1.thought.tokenizer import add_tags
from tests.reference.traces import TAGS
from tests.serve.release import tokenizer

WORDS = tokenizer()
# So few merges that most characters beyond ASCII are several tokens.
BYTES = train_tokenizer(["the sum of x² and y² is 13"] * 3, vocab_size=280)
add_tags(BYTES)


@given(st.text(max_size=40))
def test_pieces_are_the_whole_text_and_never_half_a_character(text: str) -> None:
    tokens = BYTES.encode(text, add_special_tokens=False)
    detokenizer = Detokenizer(BYTES)
    pieces = [detokenizer.add(token) for token in tokens]
    assert "".join(pieces) + detokenizer.finish() == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_half_a_character_at_the_end_shows_as_such() -> None:
    tokens = BYTES.encode("x 🧮", add_special_tokens=False)[:-1]
    detokenizer = Detokenizer(BYTES)
    assert "".join(map(detokenizer.add, tokens)) == "x "
    assert "x " + detokenizer.finish() == decode(BYTES, tokens)


@given(
    st.lists(st.sampled_from("ab"), max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)
)
def test_a_text_is_cut_at_its_first_stop_however_it_comes(pieces: list[str], stops: list[str]) -> None:
    """With pieces of one character, a stop ends where its last character comes; the earliest end wins."""
    text = "".join(pieces)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    cutter = StopCutter(tuple(stops))
    shown_text = "".join(map(cutter.add, pieces))
    assert cutter.hit == bool(ends)
    if ends:
        first = text[: min(ends)]
        assert shown_text == first[: min(first.find(stop) for stop in stops if stop in first)]
    else:
        assert shown_text + cutter.finish() == text


@pytest.mark.parametrize("stop", ["w20", "w2", "0 w2"])
def test_a_stop_counts_in_the_main_text_alone(stop: str) -> None:
    """Three paths and a summary hold the stop; the main text meets it afterwards."""
    rng = random.Random(0)
    response = ResponseAssembler(WORDS, TAGS, (stop,))
    main, inside = WORDS.encode("w8 w10"), WORDS.encode("w10 w20 w21")
    spoken = [((), token) for token in (*main, TAGS.parallel)]
    paths = [[((1, index), token) for token in (TAGS.path, *inside, TAGS.path_end)] for index in range(3)]
    while any(paths):
        spoken.append(rng.choice([path for path in paths if path]).pop(0))
    spoken += [((1,), token) for token in (TAGS.parallel_end, TAGS.summary, *inside, TAGS.summary_end)]
    spoken += [((), token) for token in WORDS.encode("w30 w10 w20 w31")]
    for branch, token in spoken:
        response.add(branch, token)
    assert response.stopped
    response.end("length")
    expected = WORDS.decode([token for _, token in sorted_flat(spoken)])
    content = response.take_delta().content
    assert content == expected[: expected.rindex(stop, 0, expected.rindex("w31"))]
    assert response.finish_reason == "stop"
    assert response.parallel()["texts"][1].startswith(" w30")


def sorted_flat(spoken: list[tuple[tuple[int, ...], int]]) -> list[tuple[tuple[int, ...], int]]:
    """The same tokens in flat order: the main text up to the block, paths in order, summary, the rest."""
    opened = spoken.index(((), TAGS.parallel)) + 1
    paths = [item for index in range(3) for item in spoken[opened:] if item[0] == (1, index)]
    summary = [item for item in spoken if item[0] == (1,)]
    return [*spoken[:opened], *paths, *summary, *(item for item in spoken[opened:] if item[0] == ())]
