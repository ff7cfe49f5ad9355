"""Whether an answer is kept; and if not, why.

The reasons are tried in their order, cheap and telling ones first; the first that holds is counted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from megatron_parallel_r1.coldstart.settings import Check
from megatron_parallel_r1.coldstart.teacher import Answer
from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.data.trace_text import WrittenTrace, canonical
from megatron_parallel_r1.rewards.verification import Attempt, judge
from megatron_parallel_r1.rewards.verifier import Verifier
from megatron_parallel_r1.thought.parser import ParseError

Reason = Literal[
    "refused",
    "empty",
    "cut by length",
    "too long",
    "malformed",
    "no block",
    "lonely path",
    "blank part",
    "names a sibling",
    "no answer",
    "wrong answer",
    "repeated",
]
REASONS: tuple[Reason, ...] = get_args(Reason)
_SHOWN = 60


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why an answer is not kept.

    Attributes:
        kind: within the reason, where that has several: the parser's own words for `malformed`.
        detail: of this answer.
    """

    reason: Reason
    kind: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Shape:
    """The parallel structure of a trace: the paths of each block, nested ones included, in their order."""

    paths: tuple[int, ...] = ()

    @property
    def blocks(self) -> int:
        return len(self.paths)

    @property
    def widest(self) -> int:
        """Paths of the widest block, 0 without one."""
        return max(self.paths, default=0)


@dataclass(frozen=True, slots=True)
class Checked:
    """An answer after the check.

    Attributes:
        text: canonical; what a trace that is kept trains on.
        rejection: None: it is kept.
        shape: where it is well-formed, else empty.
    """

    text: str
    rejection: Rejection | None
    shape: Shape = Shape()

    @property
    def kept(self) -> bool:
        return self.rejection is None


def check(answer: Answer, problem: Problem, asked: Check, verifier: Verifier) -> Checked:
    """Checks one answer. `repeated` is not for this function to find; it sees no other answer."""
    text = canonical(answer.text.strip())
    if rejection := _before_reading(answer, text, asked):
        return Checked(text, rejection)
    try:
        written = WrittenTrace.of(text)
    except ParseError as error:
        return Checked(text, Rejection("malformed", error.what, _place(text, error)))
    shape = Shape(tuple(len(block.paths) for _, block in written.tree.all_blocks()))
    rejection = _of_form(written, shape, asked) or _of_answer(written, problem, verifier)
    return Checked(text, rejection, shape)


def _before_reading(answer: Answer, text: str, asked: Check) -> Rejection | None:
    if answer.finish == "refused":
        return Rejection("refused")
    if answer.finish == "length":
        return Rejection("cut by length", detail=f"ends with {text[-_SHOWN:]!r}")
    if not text:
        return Rejection("empty")
    if len(text) > asked.max_chars:
        return Rejection("too long", detail=f"{len(text)} characters")
    return None


def _of_form(written: WrittenTrace, shape: Shape, asked: Check) -> Rejection | None:
    if asked.parallel and not shape.blocks:
        return Rejection("no block")
    if 1 in shape.paths:
        return Rejection("lonely path", detail=f"block {shape.paths.index(1) + 1} has one path")
    for number, (_, block) in enumerate(written.tree.all_blocks(), 1):
        paths = [written.inside(path) for path in block.paths]
        assert block.summary is not None, "a strict parse leaves no block without its summary"
        if not all(part.strip() for part in (*paths, written.inside(block.summary))):
            return Rejection("blank part", detail=f"a path or the summary of block {number} says nothing")
        if asked.independent and (named := sibling_named(paths)):
            return Rejection("names a sibling", detail=f"block {number}: {named!r}")
    return None


def _of_answer(written: WrittenTrace, problem: Problem, verifier: Verifier) -> Rejection | None:
    (judged,) = judge([Attempt(written.main, written.tree, problem.answers)], verifier)
    if judged.correct:
        return None
    if judged.extracted is None:
        return Rejection("no answer", detail=f"ends with {written.main[-_SHOWN:]!r}")
    return Rejection(
        "wrong answer",
        detail=f"{judged.extracted[:_SHOWN]!r} instead of {problem.answer!r} ({judged.reason})",
    )


def _place(text: str, error: ParseError) -> str:
    before, after = WrittenTrace.around(text, error.index)
    return f"behind {before[-_SHOWN:]!r}" + (f", at {after[:_SHOWN]!r}" if after else "")


_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
_KIND = r"(?:(?:reasoning|solution|parallel|sibling|thinking)\s+)?"
_NAMED = re.compile(
    rf"\b(?P<ordinal>{'|'.join(_ORDINALS)})\s+{_KIND}path\b|\bpath\s+(?:\#\s*)?(?P<number>[1-8])\b(?![.,]\d)",
    re.IGNORECASE,
)
_OTHERS = re.compile(
    rf"\b(?:the|all|both|any)\s+(?:other|previous|preceding|earlier)\s+{_KIND}paths?\b|\bsibling\s+paths?\b",
    re.IGNORECASE,
)


def sibling_named(paths: Sequence[str]) -> str | None:
    """The first mention of a sibling in the texts of a block's paths; None if there is none."""
    if len(paths) < 2:
        return None
    for own, text in enumerate(paths):
        for named in _NAMED.finditer(text):
            ordinal = named["ordinal"]
            which = _ORDINALS.index(ordinal.lower()) if ordinal else int(named["number"]) - 1
            if which != own and which < len(paths):
                return named.group()
        if others := _OTHERS.search(text):
            return others.group()
    return None
