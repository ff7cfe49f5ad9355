r"""Finds the last `\boxed{…}` of a text, which marks the answer of a solution; one pass for any text."""

from __future__ import annotations

import re

_BRACES = re.compile(
    r"\\(?:boxed|fbox)\s{0,8}(?P<open>\{)"
    r"|\\(?:boxed|fbox)(?:[ \t]{1,8}|(?![A-Za-z]))(?P<bare>[^\s${}\\]*[^\s${}\\.,;:])"
    r"|\\."
    r"|[{}]",
    re.DOTALL,
)

HEDGES = frozenset({"alternatively", "maybe", "might", "or", "perhaps", "possibly", "probably"})
"""Words beside an answer that keep another one open."""

NAME = r"(?:[A-Za-z]|\\[a-z]+)(?:_\{?\w+\}?)?"
"""Pattern of the name of a variable."""

MAX_BETWEEN = 80
"""Boxes that are one answer are not farther apart, in characters."""

_CONTENT = re.compile(r"\S")
_HEDGE = rf"(?:(?i:{'|'.join(sorted(HEDGES))})|\\lor|\\vee)(?![A-Za-z])"
_ANY_HEDGE = re.compile(rf"(?<![A-Za-z]){_HEDGE}")
_ALSO = rf"{_HEDGE}|(?i:and|either|also|else|otherwise|both)(?![A-Za-z])"
_GAP = r"(?:[\s$,;:(){}*]|\\[,;:!()\[\] $]|\\q?quad|\\(?:text|textbf|mathrm|mbox)(?=\{))"
_TOGETHER = re.compile(rf"(?:{_GAP}|[.&/]|\\text\{{[^{{}}]*\}}|{_ALSO}|{NAME}\s?=)*")
_LAST_NAME = re.compile(rf"(?<![A-Za-z]){NAME}\s?=\s?$")
_IS = rf"(?:{_GAP}|{_ALSO}|(?i:even|just|it|is|the|answer|[a-z](?= is))(?![A-Za-z]))*"
_FORMULA = rf"(?:{NAME}\s?=\s?)?[^\n$=<>]{{1,40}}?"
_SIDES_BEFORE = (  # an equation to solve, or words without a number, are prose
    rf"\${_FORMULA}\$",
    rf"\\[(\[]{_FORMULA}\\[)\]]",
    rf"(?<![^\s$])(?<![=<>] )(?:{NAME}\s?=\s?|\\?\$)?"
    r"(?![,;:)]|\(?[A-Za-z][a-z]|\S*\$)[^\s$=<>]{0,39}[^\s$=<>.?]",
    r"(?<![^\s$])[^\s=<>]{0,39}\d[^\s=<>]{0,9} [A-Za-z]{1,20}",
    r"(?<![A-Za-z])(?i:either)(?![A-Za-z])[^.\n]{1,40}?",
)
_ALTERNATIVE_BEFORE = re.compile(
    rf"(?:{'|'.join(_SIDES_BEFORE)}){_GAP}*(?<![A-Za-z]){_HEDGE}{_IS}(?:{NAME}\s?=\s?)?$"
)
_LOOSE = rf"(?:{_GAP}|[-–—/`\[\]])"
_ALTERNATIVE_AFTER = re.compile(  # on the same line anything, farther off only what looks like an answer
    rf"(?:(?!\n){_LOOSE})*(?<![A-Za-z]){_HEDGE}[^\n]*"
    rf"|(?:(?:{_LOOSE}|[.!?])*|[^\n.]{{0,20}}?)(?<![A-Za-z]){_HEDGE}{_IS}"
    r"(?:[-+.\d\\({]|(?![aI] )[A-Za-z](?![A-Za-z]))[^\n]*"
)
_IN_PARENTHESES = re.compile(r"^([\s$]*)\((.*)\)")


def last_boxes(text: str, before: int | None = None, *, alternatives: bool = True) -> str | None:
    r"""Returns the content of the last box, or of several that are one answer: `\boxed{1} and \boxed{2}`.

    `\boxed 9`, without braces, counts too; of nested boxes the inner one counts. None without a closed,
    non-empty box.

    Args:
        before: consider only boxes that open before this index; None: all.
        alternatives: what `or` joins is part of the answer, `5 or 6` for `\boxed{5} or 6`. False, for worked
            solutions, where `or` joins two spellings of one answer: the last box counts.
    """
    if not (boxes := _boxes(text, before)):
        return None
    whole, content = boxes[-1]
    around = text[max(0, whole.start - 60) : whole.stop + 40]
    if len(boxes) == 1 and (not alternatives or not _ANY_HEDGE.search(around)):
        return text[content].strip()
    first = last = len(boxes) - 1
    while first and 0 <= boxes[first][0].start - boxes[first - 1][0].stop < MAX_BETWEEN:
        between = text[boxes[first - 1][0].stop : boxes[first][0].start]
        if not _TOGETHER.fullmatch(between) or (not alternatives and _ANY_HEDGE.search(between)):
            break
        first -= 1
    start, stop = boxes[first][0].start, boxes[last][0].stop
    contents = {text[content].strip() for _, content in boxes[first:]}
    first_half = alternatives and _ALTERNATIVE_BEFORE.search(text, max(0, start - 60), start)
    second_half = alternatives and _ALTERNATIVE_AFTER.match(text, stop)
    start = first_half.start() if first_half else start
    stop = second_half.end() if second_half else stop
    if not first_half and not second_half and len(contents) == 1:
        return contents.pop()
    if first < last and (name := _LAST_NAME.search(text, max(0, start - 20), start)):
        start = name.start()
    pieces: list[str] = []
    for whole, content in boxes[first:]:
        between = text[start : whole.start]
        pieces += [between if not pieces or between.strip(" \n$") else ", ", text[content]]
        start = whole.stop
    return "".join([*pieces, _IN_PARENTHESES.sub(r"\1\2", text[start:stop])]).strip()


def _boxes(text: str, before: int | None) -> list[tuple[slice, slice]]:
    """Returns the spans of the closed, non-empty boxes and of their contents, by the start of the content."""
    stop = len(text) if before is None else before
    spans: list[tuple[int, int, int, int]] = []
    braces: list[tuple[int, int] | None] = []  # an open box, None for an ordinary brace
    for token in _BRACES.finditer(text):
        if token["open"]:
            braces.append(token.span())
        elif token["bare"]:
            spans.append((*token.span("bare"), token.start(), token.end()))
        elif token[0] == "{":
            braces.append(None)
        elif token[0] == "}" and braces and (box := braces.pop()):
            spans.append((box[1], token.start(), box[0], token.end()))
    return [
        (slice(outer, end), slice(start, close))
        for start, close, outer, end in sorted(spans)
        if start < stop and _CONTENT.search(text, start, close)
    ]
