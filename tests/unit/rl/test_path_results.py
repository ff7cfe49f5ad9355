from __future__ import annotations

import pytest

from megatron_parallel_r1.data.embedded.traces import stated_result
from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.rewards.base import Judged
from megatron_parallel_r1.rewards.format_check import Format
from megatron_parallel_r1.rewards.verifier import Verifier
from megatron_parallel_r1.rl.metrics import judge_traces, trace_metrics
from megatron_parallel_r1.rl.packed_trace import PackedTrace
from megatron_parallel_r1.rl.path_results import path_lengths, stated_value, summary_metrics
from megatron_parallel_r1.thought.parser import parse
from megatron_parallel_r1.thought.tags import Tags
from megatron_parallel_r1.thought.trace import Trace

TAGS = Tags(parallel=1, parallel_end=2, path=3, path_end=4, summary=5, summary_end=6, eos=0)
TAG_NAMES = {"P": 1, "/P": 2, "p": 3, "/p": 4, "S": 5, "/S": 6, "$": 0}


class Words:
    """A tokenizer of words, which are numbered from 7 as they come."""

    eos_token_id = 0

    def __init__(self) -> None:
        self._words: list[str] = []

    def encode(self, text: str) -> list[int]:
        return [TAG_NAMES[word] if word in TAG_NAMES else self._number(word) for word in text.split()]

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        assert not skip_special_tokens
        return " ".join(self._words[token - 7] for token in tokens if token >= 7)

    def _number(self, word: str) -> int:
        if word not in self._words:
            self._words.append(word)
        return 7 + self._words.index(word)


WORDS = Words()


def trace(text: str) -> Trace:
    tokens = tuple(WORDS.encode(text))
    flags = (True,) * len(tokens)
    return Trace((7,), tokens, flags, flags, (0.0,) * len(tokens), "eos", parse(tokens, TAGS))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("half of 50 is 25 points.", "25"),
        ("so x = -3.", "-3"),
        ("50-25", "25"),
        ("1,200 and 3/4", "3/4"),
        ("it costs 1,200, or so", "1,200"),
        (r"it is \frac{3}{4}, that is 0.75", "0.75"),
        (r"it is -\dfrac{3}{4} then", r"-\dfrac{3}{4}"),
        ("about 40% of it", "40%"),
        (r"\boxed{7} of 9", "7"),
        ("Final Answer: x+1", "x+1"),
        ("x_1 and v2", None),
        ("nothing", None),
        ("", None),
    ],
)
def test_stated_value(text: str, value: str | None) -> None:
    assert stated_value(text) == value


@pytest.mark.parametrize(
    ("text", "agreement", "majority"),
    [
        ("P p is 4 /p p is 5 /p p gives 5.0 /p /P S so 5 /S", 1.0, 1.0),
        ("P p is 4 /p p is 5 /p p gives 5.0 /p /P S so 4 /S", 1.0, 0.0),
        ("P p is 4 /p p is 5 /p /P S so 4 /S", 1.0, 1.0),  # a draw
        ("P p is 4 /p p is 5 /p /P S so 6 /S", 0.0, 0.0),
        ("P p hm /p p is 5 /p /P S so 5 /S", 1.0, 1.0),
        ("P p is 1/2 /p p is 0.5 /p /P S so 50% /S", 1.0, 1.0),
        # Nothing to hold against each other.
        ("P p hm /p p so /p /P S so 5 /S", None, None),
        ("P p is 5 /p p is 5 /p /P S hm /S", None, None),
        ("P p is 5 /p /P S so 5 /S", None, None),
        ("P p is 5 /p p is 5 /p", None, None),
        ("is 5 $", None, None),
        # Two blocks, and one inside another.
        ("P p is 4 /p p is 5 /p /P S so 4 /S P p is 4 /p p is 5 /p /P S so 6 /S $", 0.5, 0.5),
        ("P p P p is 2 /p p is 3 /p /P S so 9 /S so 4 /p p is 4 /p /P S so 4 /S", 0.5, 0.5),
    ],
)
def test_summaries_against_their_paths(text: str, agreement: float | None, majority: float | None) -> None:
    assert summary_metrics([PackedTrace.of(trace(text))], WORDS) == {
        "summary_agreement": agreement,
        "summary_majority": majority,
    }


def test_blocks_are_pooled_over_traces_and_results_read_as_asked() -> None:
    traces = [
        trace("P p found=4 1 /p p 7 found=5 8 /p /P S found=5 2 /S"),
        trace("P p found=4 /p p found=5 /p /P S found=6 /S P p found=1 /p p 3 /p /P S found=1 /S"),
        trace("found=4"),
    ]
    measured = summary_metrics([PackedTrace.of(t) for t in traces], WORDS, stated_result)
    assert measured == {"summary_agreement": pytest.approx(2 / 3), "summary_majority": pytest.approx(2 / 3)}


def test_path_lengths_leave_the_tags_out() -> None:
    assert list(path_lengths(trace("a P p b c /p p /p /P S /S").tree)) == [2, 0]
    assert list(path_lengths(trace("P p a /p p b c d").tree)) == [1, 3]  # cut: no </Path>
    assert list(path_lengths(trace("P p P p a /p /P S /S /p /P S /S").tree)) == [7, 1]


def test_lengths_and_differences_among_a_steps_metrics() -> None:
    traces = [trace("P p a b /p p a c d e /p /P S 5 /S $"), trace("a b $")]
    problems = [Problem("1", "?", ("5",), "by hand")] * 2
    with Verifier() as verifier:
        judged = judge_traces(traces, problems, WORDS, verifier)
    assert [(verdict.length, verdict.critical_length) for verdict in judged] == [(16, 12), (3, 3)]
    assert [verdict.difference for verdict in judged] == [pytest.approx(1 - 2 * 1 / 6), None]
    assert judged[0].references == ("5",) and judged[1].text == "a b"
    outlines = [t.outline for t in traces]
    metrics = trace_metrics(outlines, judged)
    assert metrics["path_length"] == 3.0 and metrics["path_difference"] == pytest.approx(2 / 3)
    alone = trace_metrics(outlines[1:], judged[1:])
    assert alone["path_length"] is None and alone["path_difference"] is None


def test_what_has_no_answer_or_could_not_be_judged_is_counted() -> None:
    facts = [(None, "empty"), ("9^{9^{9^9}}", "timeout"), ("5", "number"), ("x", "crash")]
    judged = [Judged(answer == "5", Format(), answer, reason) for answer, reason in facts]
    metrics = trace_metrics([trace("a $").outline] * 4, judged)
    assert (metrics["accuracy"], metrics["unanswered"], metrics["unverified"]) == (0.25, 0.25, 0.5)
