"""Whether each path found the right answer by itself, read off traces of the embedded curriculum."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_parallel_r1.data.embedded.generate import build_tokenizer
from megatron_parallel_r1.data.embedded.traces import stated_result
from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.rewards.verifier import Verifier
from megatron_parallel_r1.rl.packed_trace import PackedTrace
from megatron_parallel_r1.rl.path_results import PathVerdicts, judge_paths
from megatron_parallel_r1.thought.parser import parse
from megatron_parallel_r1.thought.tokenizer import add_tags
from megatron_parallel_r1.thought.trace import Trace

TOKENIZER = build_tokenizer()
TAGS = add_tags(TOKENIZER)


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier() as verifier:
        yield verifier


def path(*inside: str) -> str:
    return " ".join(["<Path>", *inside, "</Path>"])


def block(*paths: str, summary: str = "none") -> str:
    return f"<Parallel> {' '.join(paths)} </Parallel> <Summary> {summary} </Summary>"


def trace(text: str) -> Trace:
    tokens = tuple(TOKENIZER.encode(text, add_special_tokens=False))
    assert TOKENIZER.unk_token_id not in tokens, text
    flags = (True,) * len(tokens)
    return Trace(tokens[:1], tokens, flags, flags, (0.0,) * len(tokens), "eos", parse(tokens, TAGS))


def judged(verifier: Verifier, *questions: tuple[str, tuple[str, ...]]) -> list[PathVerdicts]:
    """Of traces by their texts, each with its problem's answers."""
    traces = [PackedTrace.of(trace(text)) for text, _ in questions]
    problems = [Problem(str(i), "?", answers, "made up") for i, (_, answers) in enumerate(questions)]
    return judge_paths(traces, problems, TOKENIZER, verifier, stated_result)


def test_a_path_is_right_or_wrong_or_silent(verifier) -> None:
    text = block(path("found=7"), path("found=8"), path("none"), path(), summary="found=8")
    assert judged(verifier, (text, ("7",))) == [[[True, False, None, None]]]


def test_any_of_a_problems_answers_is_right(verifier) -> None:
    """The next path's verdict is its own, whichever answer decided the one before."""
    text = block(path("found=7"), path("found=8"), path("found=9"), path("found=7"))
    assert judged(verifier, (text, ("7", "9"))) == [[[True, False, True, True]]]
    assert judged(verifier, (text, ("1", "8", "2"))) == [[[False, True, False, False]]]


def test_a_path_states_what_it_says_last_and_the_rest_of_the_trace_says_nothing(verifier) -> None:
    text = "found=7 " + block(path("found=7", "found=8"), path("found=8", "found=7"), summary="found=7")
    assert judged(verifier, (text, ("7",))) == [[[False, True]]]


def test_blocks_in_order_of_appearance_nested_ones_too(verifier) -> None:
    inner = block(path("found=7"), path("none"))
    text = " ".join(
        [block(path("found=8", inner), path("found=7")), block(path("found=8")), "Final Answer: 7"]
    )
    # What a path's inner block states it states too: the last of it.
    assert judged(verifier, (text, ("7",))) == [[[True, True], [True, None], [False]]]


def test_an_open_path_is_read_to_its_end(verifier) -> None:
    text = "<Parallel> " + path("found=8") + " <Path> found=8 found=7"
    assert judged(verifier, (text, ("7",))) == [[[False, True]]]


def test_every_trace_is_held_against_its_own_problem(verifier) -> None:
    text = block(path("found=7"), path("none"), path("found=8"))
    traces = [
        (text, ("7",)),
        ("found=7 Final Answer: 7", ("7",)),
        (text, ("8",)),
        (block(path("none")), ("8",)),
        (text, ("1", "7", "8")),
        (text, ("2", "3")),
    ]
    assert judged(verifier, *traces) == [
        [[True, None, False]],
        [],
        [[False, None, True]],
        [[None]],
        [[True, None, True]],
        [[False, None, False]],
    ]


def test_no_traces_no_verdicts(verifier) -> None:
    assert judged(verifier) == []
