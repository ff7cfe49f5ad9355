"""The check, reason by reason, and on the real traces."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pyarrow import parquet

from megatron_parallel_r1.coldstart.checks import TraceShape, check, sibling_mention
from megatron_parallel_r1.coldstart.report import CheckedSample, Tally
from megatron_parallel_r1.coldstart.teacher import TeacherAnswer
from megatron_parallel_r1.config.selection import Check
from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.data.trace_text import WrittenTrace, canonical, describe_fault
from megatron_parallel_r1.rewards.verifier import Verifier
from megatron_parallel_r1.thought.formats import NPR
from megatron_parallel_r1.thought.parser import ParseError
from tests.unit.coldstart.written_traces import block, posed, trace


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier() as verifier:
        yield verifier


def test_a_good_trace_is_kept_in_canonical_spelling(verifier: Verifier) -> None:
    checked = check(TeacherAnswer(f"\n{trace('6', (2, 3))}\n", "stop"), posed(3), Check(), verifier)
    assert checked.kept and checked.shape == TraceShape((2, 3))
    assert checked.text.startswith("Let us") and "<Parallel><Path>\nlook" in checked.text
    assert (checked.shape.blocks, checked.shape.widest) == (2, 3)


@pytest.mark.parametrize(
    ("text", "finish", "reason", "kind"),
    [
        (trace("6"), "refused", "refused", ""),
        (" \n", "stop", "empty", ""),
        (trace("6"), "length", "cut by length", ""),
        (trace("6", note="x" * 30_000), "stop", "too long", ""),
        ("<Parallel> so <Path>a</Path>", "stop", "malformed", "text between the paths of a block"),
        ("a</Path> Final Answer: 6", "stop", "malformed", "</Path> inside the main text"),
        ("<Parallel><Path>a", "stop", "malformed", "the trace ends inside a path"),
        ("Final Answer: 6", "stop", "no block", ""),
        (trace("6", (2, 1)), "stop", "lonely path", ""),
        (block(text="").replace("0", "").replace("1", "") + "Final Answer: 6", "stop", "blank part", ""),
        (block(text="as the second path says") + "Final Answer: 6", "stop", "names a sibling", ""),
        (block() + "It is 6.", "stop", "no answer", ""),
        (block(text="Final Answer: 6 ") + "So it is.", "stop", "no answer", ""),
        (trace("7"), "stop", "wrong answer", ""),
    ],
)
def test_each_reason(text: str, finish: str, reason: str, kind: str, verifier: Verifier) -> None:
    rejection = check(TeacherAnswer(text, finish), posed(3), Check(), verifier).rejection
    assert rejection is not None
    assert (rejection.reason, rejection.kind) == (reason, kind)


NPR_TRACE = (
    "It splits. <guideline> <plan>1: by twos</plan> <plan>2: by threes</plan> </guideline> "
    "<step> 1: two threes </step> <step> 2: three twos </step> <takeaway> 6 </takeaway> Final Answer: 6"
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (NPR_TRACE, None),
        (NPR_TRACE.replace("two threes", " "), "blank part"),
        (NPR_TRACE.replace("three twos", "see path 1"), "names a sibling"),
        (NPR_TRACE.replace(" <plan>2: by threes</plan>", ""), "malformed"),
        (trace("6"), "no block"),  # tags of another format are mere text
    ],
)
def test_another_format(text: str, reason: str | None, verifier: Verifier) -> None:
    checked = check(TeacherAnswer(text, "stop"), posed(3), Check(), verifier, NPR)
    assert (checked.rejection and checked.rejection.reason) == reason
    assert reason or checked.shape == TraceShape((2,))
    assert reason or "</guideline>\n<step>\n1:" in checked.text


def test_what_is_not_asked_is_not_checked(verifier: Verifier) -> None:
    loose = Check(parallel=False, independent=False)
    for text in ("Final Answer: 6", block(text="as the second path says") + "Final Answer: 6"):
        assert check(TeacherAnswer(text, "stop"), posed(3), loose, verifier).kept


@pytest.mark.parametrize(
    ("paths", "named"),
    [
        (("First path: add.", "Second path: count. This path is short."), None),
        (("add", "As in the first path, add."), "first path"),
        (("add", "As in the first reasoning path, add."), "first reasoning path"),
        (("see Path 2", "count"), "Path 2"),
        (("path 1: add", "path 2: count"), None),
        (("add", "the other paths agree"), "the other paths"),
        (("the path has 3 stones", "walk along the second half of the path"), None),
        (("the third path in the garden", "count"), None),  # the block has two, so it is the garden's
        (("only one, like the second path",), None),
        (("path 2.5 m wide", "count"), None),
    ],
)
def test_sibling_mention(paths: tuple[str, ...], named: str | None) -> None:
    assert sibling_mention(paths) == named


def test_written_agrees_with_the_readers(real_data: Path) -> None:
    table = parquet.read_table(real_data / "parallel_gsm8k.parquet")
    for response in table["response"].to_pylist():
        text = canonical(response)
        try:
            written = WrittenTrace.of(text)
        except ParseError as error:
            assert describe_fault(text).startswith(error.what)
        else:
            assert describe_fault(text) is None
            assert "".join(written.pieces) == text


def survey(real_data: Path, settings: Check, verifier: Verifier) -> Tally:
    """Checks each published row, malformed ones too, as if a teacher had just written it."""
    checked = []
    for index, row in enumerate(parquet.read_table(real_data / "parallel_gsm8k.parquet").to_pylist()):
        problem = Problem(str(index), row["question"], (row["answer"].strip(),), "published")
        answer = TeacherAnswer(row["response"], "stop")
        checked.append(CheckedSample(problem.id, 0, check(answer, problem, settings, verifier)))
    return Tally.of(checked, examples=3, seed=0)


def test_the_real_traces(real_data: Path, verifier: Verifier) -> None:
    """The pass table of the published traces, told in docs/coldstart.md."""
    tally = survey(real_data, Check(), verifier)
    assert (tally.answers, tally.passed) == (281, 274)
    assert tally.reasons == (
        ("malformed", "text between the paths of a block", 1),
        ("malformed", "text where <Summary> must follow </Parallel>", 1),
        ("no block", "", 3),
        ("names a sibling", "", 2),
    )
    assert [example.problem for example in tally.examples] == ["88", "125", "64", "95", "278", "170", "222"]
    loose = survey(real_data, Check(parallel=False, independent=False), verifier)
    assert loose.passed == 279
