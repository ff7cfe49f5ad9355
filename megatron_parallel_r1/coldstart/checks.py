"""Checks an answer and gives the reason for a rejection.

The checks run in the order of `REASONS`, cheap and specific ones first; the first that fails is counted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from megatron_parallel_r1.coldstart.teacher import TeacherAnswer
from megatron_parallel_r1.config.selection import Check
from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.data.trace_text import WrittenTrace, canonical
from megatron_parallel_r1.rewards.base import Judged
from megatron_parallel_r1.rewards.verification import ResponseToJudge, judge
from megatron_parallel_r1.rewards.verifier import Verifier
from megatron_parallel_r1.thought.formats import PARALLEL_R1, ThinkingFormat
from megatron_parallel_r1.thought.parser import ParseError

RejectionReason = Literal[
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
REASONS: tuple[RejectionReason, ...] = get_args(RejectionReason)
_EXCERPT_CHARS = 60


@dataclass(frozen=True, slots=True)
class Rejection:
    """The reason why an answer is not kept.

    Attributes:
        kind: the kind within the reason, where there are several: the parser's message for `malformed`.
        detail: the detail of this answer.
    """

    reason: RejectionReason
    kind: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class TraceShape:
    """The parallel structure of a trace: the number of paths of each block, nested blocks included."""

    paths: tuple[int, ...] = ()

    @property
    def blocks(self) -> int:
        return len(self.paths)

    @property
    def widest(self) -> int:
        """The number of paths of the widest block, 0 without a block."""
        return max(self.paths, default=0)


@dataclass(frozen=True, slots=True)
class Checked:
    """A checked answer.

    Attributes:
        text: the canonical text, on which a kept trace trains.
        rejection: None for a kept answer.
        shape: the shape of a well-formed answer, else empty.
    """

    text: str
    rejection: Rejection | None
    shape: TraceShape = TraceShape()

    @property
    def kept(self) -> bool:
        return self.rejection is None


def check(
    answer: TeacherAnswer,
    problem: Problem,
    settings: Check,
    verifier: Verifier,
    format: ThinkingFormat = PARALLEL_R1,
) -> Checked:
    """Checks one answer, except for `repeated`, which needs the other answers."""
    checked, written = check_form(answer, settings, format)
    if written is None:
        return checked
    (judged,) = judge([ResponseToJudge(written.main, written.tree, problem.answers)], verifier)
    return check_answer(checked, judged, written, problem)


def check_form(
    answer: TeacherAnswer, settings: Check, format: ThinkingFormat = PARALLEL_R1
) -> tuple[Checked, WrittenTrace | None]:
    """Checks everything but the final answer; returns the parsed trace too if it passes so far."""
    text = canonical(answer.text.strip(), format)
    if rejection := _reject_unparsed(answer, text, settings):
        return Checked(text, rejection), None
    try:
        written = WrittenTrace.of(text, format=format)
    except ParseError as error:
        return Checked(text, Rejection("malformed", error.what, _where(text, error, format))), None
    shape = TraceShape(tuple(len(block.paths) for _, block in written.tree.all_blocks()))
    rejection = _reject_form(written, shape, settings, format)
    return Checked(text, rejection, shape), None if rejection else written


def check_answer(checked: Checked, judged: Judged, written: WrittenTrace, problem: Problem) -> Checked:
    """Adds the rejection of a wrong or missing answer to a trace that passes in form."""
    if judged.correct:
        return checked
    if judged.extracted is None:
        return replace(
            checked, rejection=Rejection("no answer", detail=f"ends with {written.main[-_EXCERPT_CHARS:]!r}")
        )
    detail = f"{judged.extracted[:_EXCERPT_CHARS]!r} instead of {problem.answer!r} ({judged.reason})"
    return replace(checked, rejection=Rejection("wrong answer", detail=detail))


def _reject_unparsed(answer: TeacherAnswer, text: str, settings: Check) -> Rejection | None:
    if answer.finish == "refused":
        return Rejection("refused")
    if answer.finish == "length":
        return Rejection("cut by length", detail=f"ends with {text[-_EXCERPT_CHARS:]!r}")
    if not text:
        return Rejection("empty")
    if len(text) > settings.max_chars:
        return Rejection("too long", detail=f"{len(text)} characters")
    return None


def _reject_form(
    written: WrittenTrace, shape: TraceShape, settings: Check, format: ThinkingFormat
) -> Rejection | None:
    if settings.parallel and not shape.blocks:
        return Rejection("no block")
    if format.plan is None and 1 in shape.paths:  # a plan may well ask for one
        return Rejection("lonely path", detail=f"block {shape.paths.index(1) + 1} has one path")
    for number, (_, block) in enumerate(written.tree.all_blocks(), 1):
        paths = [written.inside(path) for path in block.paths]
        summary = [written.inside(block.summary)] if block.summary is not None else []
        if not all(part.strip() for part in (*paths, *summary)):
            return Rejection("blank part", detail=f"a path or the summary of block {number} is blank")
        if settings.independent and (mention := sibling_mention(paths)):
            return Rejection("names a sibling", detail=f"block {number}: {mention!r}")
    return None


def _where(text: str, error: ParseError, format: ThinkingFormat) -> str:
    before, after = WrittenTrace.around(text, error.index, format)
    return f"after {before[-_EXCERPT_CHARS:]!r}" + (f", at {after[:_EXCERPT_CHARS]!r}" if after else "")


_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
_ADJECTIVE = r"(?:(?:reasoning|solution|parallel|sibling|thinking)\s+)?"
_ONE_SIBLING = re.compile(
    rf"\b(?P<ordinal>{'|'.join(_ORDINALS)})\s+{_ADJECTIVE}path\b|\bpath\s+(?:\#\s*)?(?P<number>[1-8])\b(?![.,]\d)",
    re.IGNORECASE,
)
_SEVERAL_SIBLINGS = re.compile(
    rf"\b(?:the|all|both|any)\s+(?:other|previous|preceding|earlier)\s+{_ADJECTIVE}paths?\b|\bsibling\s+paths?\b",
    re.IGNORECASE,
)


def sibling_mention(paths: Sequence[str]) -> str | None:
    """Returns the first mention of a sibling in the texts of a block's paths; None without one."""
    if len(paths) < 2:
        return None
    for own, text in enumerate(paths):
        for mention in _ONE_SIBLING.finditer(text):
            ordinal = mention["ordinal"]
            index = _ORDINALS.index(ordinal.lower()) if ordinal else int(mention["number"]) - 1
            if index != own and index < len(paths):
                return mention.group()
        if others := _SEVERAL_SIBLINGS.search(text):
            return others.group()
    return None
