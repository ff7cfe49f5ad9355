"""A trace spelled out, from the parser's tree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from megatron_parallel_r1.report.traces import trace_parts
from megatron_parallel_r1.thought.parser import parse
from tests.reference.traces import TAGS, random_trace

NAMES = {0: "<Parallel>", 1: "</Parallel>", 2: "<Path>", 3: "</Path>", 4: "<Summary>", 5: "</Summary>"}
IDS = {name: index for index, name in NAMES.items()} | {"<eos>": 6}


class Words:
    """A tokenizer in which token 10 is `w10` and a tag is itself."""

    eos_token_id = TAGS.eos

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool) -> str:
        return " ".join(NAMES.get(token, f"w{token}") for token in tokens)


def _tokens(text: str) -> list[int]:
    return [IDS[word] if word in IDS else int(word[1:]) for word in text.split()]


def _judge(text: str) -> tuple[str | None, bool | None]:
    return (text.split()[-1], text.endswith("w50")) if text else (None, None)


def _parts(text: str, sampled: Sequence[bool] | None = None) -> list[dict[str, Any]]:
    tokens = _tokens(text)
    return trace_parts(tokens, parse(tokens, TAGS), Words(), _judge, sampled)


def test_a_block_between_text() -> None:
    parts = _parts(
        "w7 <Parallel> <Path> w8 w50 </Path> <Path> w9 </Path> </Parallel> <Summary> w50 </Summary> w11 <eos>"
    )
    assert parts == [
        {"kind": "text", "text": "w7"},
        {
            "kind": "block",
            "paths": [
                {"text": "w8 w50", "closed": True, "forced": False, "answer": "w50", "correct": True},
                {"text": "w9", "closed": True, "forced": False, "answer": "w9", "correct": False},
            ],
            "summary": "w50",
            "summary_closed": True,
            "well_formed": True,
            "stray": None,
        },
        {"kind": "text", "text": "w11"},
    ]


def test_a_path_that_the_engine_closed_is_marked() -> None:
    text = "<Parallel> <Path> w8 </Path> <Path> w9 </Path>"
    (block,) = _parts(text, sampled=[True, False, True, True, False, True, False])
    assert [path["forced"] for path in block["paths"]] == [False, True]


def test_a_trace_cut_in_a_path_or_a_summary() -> None:
    (block,) = _parts("<Parallel> <Path> w8 </Path> <Path> w9")
    assert [path["closed"] for path in block["paths"]] == [True, False]
    assert block["summary"] is None and not block["well_formed"]
    (block,) = _parts("<Parallel> <Path> w8 </Path> <Path> w9 </Path> </Parallel> <Summary> w10")
    assert block["summary"] == "w10" and not block["summary_closed"] and not block["well_formed"]


def test_text_after_a_block_without_summary_is_main_text() -> None:
    block, text = _parts("<Parallel> <Path> w8 </Path> </Parallel> w9")
    assert block["summary"] is None
    assert text == {"kind": "text", "text": "w9"}


def test_stray_text_of_a_malformed_block_is_kept() -> None:
    (block,) = _parts("<Parallel> w7 <Path> w8 </Path> w9 <Path> w10 </Path> w11")
    assert block["stray"] == "w7 w9 w11"


def test_a_nested_block_is_spelled_out_inside_its_path() -> None:
    inner = "<Parallel> <Path> w8 </Path> <Path> w9 </Path> </Parallel> <Summary> w50 </Summary>"
    (block,) = _parts(f"<Parallel> <Path> w7 {inner} w12 </Path> <Path> w13 </Path>")
    first, second = block["paths"]
    assert [part["kind"] for part in first["parts"]] == ["text", "block", "text"]
    assert [path["text"] for path in first["parts"][1]["paths"]] == ["w8", "w9"]
    assert "parts" not in second


def _words(parts: Sequence[dict[str, Any]]) -> Iterator[str]:
    for part in parts:
        if part["kind"] == "text":
            yield from part["text"].split()
            continue
        for path in part["paths"]:
            yield from _words(path["parts"]) if "parts" in path else path["text"].split()
        yield from (part["stray"] or "").split()
        yield from (part["summary"] or "").split()


@given(st.integers(0, 10_000), st.booleans(), st.integers(0, 12), st.integers(0, 20))
def test_no_word_of_any_trace_is_lost_or_shown_twice(seed: int, truncate: bool, tag: int, at: int) -> None:
    """Also of malformed ones: a random tag or word is put somewhere."""
    tokens = random_trace(seed, truncate=truncate)
    tokens.insert(min(at, len(tokens)), tag)
    parts = trace_parts(tokens, parse(tokens, TAGS), Words(), _judge)
    shown = sorted(word for word in _words(parts) if word.startswith("w"))
    assert shown == sorted(f"w{token}" for token in tokens if token > TAGS.eos)
