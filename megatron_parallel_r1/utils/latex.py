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

MAX_BETWEEN = 80
"""Boxes that are one answer are not farther apart, in characters."""

_CONTENT = re.compile(r"\S")
_ALSO = r"(?i:and|or|either|maybe|perhaps|possibly|alternatively|also|else|otherwise|both)(?![A-Za-z])"
_TOGETHER = re.compile(
    rf"(?:[\s$,;.:&/]|\\[,;:!()\[\] ]|\\q?quad|\\text\{{[^{{}}]*\}}|{_ALSO}"
    r"|(?:[A-Za-z](?:_\{?\w+\}?)?|\\[a-z]+)\s?=)*"
)
_NAME = re.compile(r"(?<![A-Za-z])(?:[A-Za-z](?:_\{?\w+\}?)?|\\[a-z]+)\s?=\s?$")
_HEDGES = ("or", "maybe", "perhaps", "possibly", "alternatively")
_ALTERNATIVE_BEFORE = re.compile(
    r"(?<![^\s$])\$?-?(?:\d[\w./]*|[A-Z])\$? +or +(?:maybe +|perhaps +|possibly +)?\$*$"
)
_ALTERNATIVE_AFTER = re.compile(r"\$* *,? *(?:or|maybe|perhaps|possibly|alternatively)(?![A-Za-z])[^\n]*")


def last_box(text: str, before: int | None = None) -> str | None:
    r"""Returns the stripped content of the last closed, non-empty box; None without one.

    `\boxed 9`, without braces, counts too; of nested boxes the inner one counts.

    Args:
        before: consider only boxes that open before this index; None: all.
    """
    boxes = _boxes(text, before)
    return text[boxes[-1][1]].strip() if boxes else None


def last_boxes(text: str, before: int | None = None) -> str | None:
    r"""Returns the content of the last box, or of several that are one answer: `\boxed{1} and \boxed{2}`.

    Alternatives are part of the answer: `\boxed{5} or \boxed{6}` is `5 or 6`, and so is `\boxed{5} or 6`.
    """
    if not (boxes := _boxes(text, before)):
        return None
    whole, content = boxes[-1]
    around = text[max(0, whole.start - 60) : whole.stop + 40]
    if len(boxes) == 1 and not any(word in around for word in _HEDGES):
        return text[content].strip()
    first = last = len(boxes) - 1
    while first and 0 <= boxes[first][0].start - boxes[first - 1][0].stop < MAX_BETWEEN:
        between = text[boxes[first - 1][0].stop : boxes[first][0].start]
        if not _TOGETHER.fullmatch(between):
            break
        first -= 1
    start, stop = boxes[first][0].start, boxes[last][0].stop
    contents = {text[content].strip() for _, content in boxes[first:]}
    first_half = _ALTERNATIVE_BEFORE.search(text, max(0, start - 60), start)
    second_half = _ALTERNATIVE_AFTER.match(text, stop)
    start = first_half.start() if first_half else start
    stop = second_half.end() if second_half else stop
    if not first_half and not second_half and len(contents) == 1:
        return contents.pop()
    if first < last and (name := _NAME.search(text, max(0, start - 20), start)):
        start = name.start()
    pieces: list[str] = []
    for whole, content in boxes[first:]:
        between = text[start : whole.start]
        pieces += [between if not pieces or between.strip(" \n$") else ", ", text[content]]
        start = whole.stop
    return "".join([*pieces, text[start:stop]]).strip()


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
