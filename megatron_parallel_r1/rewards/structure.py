r"""Splits answers of several parts: lists, sets, tuples, intervals, inequalities, matrices, assignments."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from megatron_parallel_r1.utils.latex import NAME

MAX_PARTS = 40
"""Unordered answers of more parts are compared in the order in which they are written."""

_MARK = re.compile(
    r"\\[{}]|[(){}\[\]]|(?P<and>,|;|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]))|(?P<cup>\\cup(?![a-z]))|\\[A-Za-z]+"
)
_MATRIX = re.compile(
    r"\\begin\{(?P<kind>[pbvBV]?matrix|array)\}(?:\{[clr|]+\})?(?P<body>.*)\\end\{(?P=kind)\}"
)
_ARRAY = re.compile(r"[(\[](\\begin\{array\}.*\\end\{array\})[)\]]")
_PLUS_MINUS = re.compile(r"\\(?:pm|mp)(?![a-z])")
_NAMED = re.compile(rf"(?P<name>{NAME}|[A-Z]{{2}})=(?P<value>[^=]+)")
_POINT = re.compile(r"\(([A-Za-z](?:,[A-Za-z])+)\)=\((.*)\)")
_COMPARISON = re.compile(r"\\(le|ge|ne)(?![A-Za-z])|([<>])(=?)")
_VARIABLE = re.compile(rf"(?!(?:[ei]|\\pi|\\infty)$){NAME}|[fg]\([a-z]\)")
_EITHER = re.compile(r"^(?:either|both) ?")
OR = re.compile(r"(?<![A-Za-z])or(?![A-Za-z])")
_LOWEST, _HIGHEST = r"-\infty", r"\infty"
_BUILDER = re.compile(
    r"(?:\\\{)?(?P<name>[a-z])(?:\\in(?:\\mathbb\{R\}|R))?(?:\\mid|\||:)(?P<body>.*?)(?:\\\})?"
)
_WITHOUT = re.compile(
    r"(?:\\mathbb\{R\}|\(-\\infty,\\infty\))(?:\\setminus|\\backslash|-)\\\{(?P<hole>[^{},]*)\\\}"
)
_OPEN, _SHUT = {"(", "[", "{", r"\{"}, {")", "]", "}", r"\}"}


@dataclass(frozen=True, slots=True)
class Parts:
    r"""An answer of several parts.

    Attributes:
        kind: its brackets, `()` or `[)` or `\{\}`; `list` without brackets; `union`; `2x3` for a matrix.
        items: the parts, as text.
        names: the left sides of `x=1, y=2`, in alphabetical order, as the items.
        variable: the variable of an inequality.
    """

    kind: str
    items: tuple[str, ...]
    names: tuple[str, ...] = ()
    variable: str | None = None


def read_parts(body: str) -> Parts | None:
    """Returns the parts of a canonical body, None for one without parts. One pass over any text."""
    if array := _ARRAY.fullmatch(body):
        body = array[1]
    if (matrix := _MATRIX.fullmatch(body)) and r"\begin" not in matrix["body"]:
        rows = [row.split("&") for row in matrix["body"].removesuffix(r"\\").split(r"\\")]
        kind = matrix["kind"][0] if matrix["kind"][0] in "vBV" and matrix["kind"][1] == "m" else ""
        return Parts(f"{kind}{len(rows)}x{len(rows[0])}", tuple(cell for row in rows for cell in row))
    if point := _POINT.fullmatch(body):
        names, values = point[1].split(","), _split(point[2], "and")
        return _assigned(names, values) if len(names) == len(values) else None
    if builder := _BUILDER.fullmatch(body):
        parts = read_parts(builder["body"])
        return parts if parts and parts.variable == builder["name"] else None
    if without := _WITHOUT.fullmatch(body):
        return Parts("union", (rf"(-\infty,{without['hole']})", rf"({without['hole']},\infty)"))
    if len(pieces := _split(body, "cup")) > 1:
        return Parts("union", tuple(pieces))
    if len(items := _split(_EITHER.sub("", body), "and")) > 1:
        return _list(body, items)
    if body[:1] in ("(", "[", "\\") and (closed := _bracketed(body)):
        return closed
    if parts := _range(body):
        return parts
    if len(_PLUS_MINUS.findall(body)) == 1:
        plus = _PLUS_MINUS.sub("+", body)
        return Parts("list", (plus.removeprefix("+"), _PLUS_MINUS.sub("-", body)))
    return None


def same_parts(answer: Parts, reference: Parts, same: Callable[[str, str], bool | None]) -> bool | None:
    """Compares two answers of several parts by a function for two parts; None means undecided."""
    this, other, kinds = answer.items, reference.items, {answer.kind, reference.kind}
    if _clash(answer, reference) or _clash(reference, answer):
        return False
    if answer.names and reference.names:
        return every(map(same, this, other))
    if r"\{\}" in kinds and kinds <= {r"\{\}", "list"}:  # a set holds no value twice
        if len(this) * len(other) > MAX_PARTS**2:
            return every(map(same, this, other)) if len(this) == len(other) else False
        covered = [_some(same(item, right) for right in other) for item in this]
        return every([*covered, *(_some(same(left, item) for left in this) for item in other)])
    if kinds not in ({answer.kind}, {"list", "()"}) or len(this) != len(other):
        return None if "union" in kinds else False
    if len(kinds) > 1 or answer.kind not in ("list", "union") or len(this) > MAX_PARTS:
        return every(map(same, this, other))
    left, undecided = list(other), False
    for item in this:  # each needs a partner of its own
        verdicts = [same(item, right) for right in left]
        if True in verdicts:
            del left[verdicts.index(True)]
        elif None in verdicts:
            undecided = True
        else:
            return False
    return None if undecided else True


def _clash(this: Parts, other: Parts) -> bool:
    """Whether the names or variables contradict each other: an interval is no point and no list."""
    if this.variable and (other.names or other.kind == "list"):
        return True
    names_differ = this.names and other.names and this.names != other.names
    return bool(names_differ or (this.variable and other.variable and this.variable != other.variable))


def every(verdicts: Iterable[bool | None]) -> bool | None:
    """Returns whether all verdicts are right, None if that is undecided."""
    seen: bool | None = True
    for verdict in verdicts:
        if verdict is False:
            return False
        seen = seen and verdict
    return seen


def _some(verdicts: Iterable[bool | None]) -> bool | None:
    opposite = every(None if verdict is None else not verdict for verdict in verdicts)
    return None if opposite is None else not opposite


def _split(body: str, mark: str) -> list[str]:
    r"""Splits outside of brackets, at `,`, `;`, `and`, `or` or at `\cup`."""
    pieces, depth, start = [], 0, 0
    for found in _MARK.finditer(body):
        if found[0] in _OPEN:
            depth += 1
        elif found[0] in _SHUT:
            depth -= 1
        elif depth == 0 and found[mark]:
            pieces.append(body[start : found.start()].strip())
            start = found.end()
    pieces.append(body[start:].strip())
    return [piece for piece in pieces if piece]


def _list(body: str, items: Sequence[str]) -> Parts:
    named = [found for found in map(_NAMED.fullmatch, items) if found]
    names = [found["name"] for found in named]
    if len(names) == len(items) == len(set(names)):
        return _assigned(names, [found["value"] for found in named])
    ranges = [parts for parts in map(_range, items) if parts and parts.kind != "union"]
    if len(ranges) == len(items) and len({parts.variable for parts in ranges}) == 1:
        pieces = [f"{parts.kind[0]}{','.join(parts.items)}{parts.kind[1]}" for parts in ranges]
        if OR.search(body):
            return Parts("union", tuple(pieces), variable=ranges[0].variable)
        below, above = sorted(ranges, key=lambda parts: parts.items[0] != _LOWEST)[:2]
        if "and" in body and len(ranges) == 2 and below.items[0] == _LOWEST and above.items[1] == _HIGHEST:
            return Parts(above.kind[0] + below.kind[1], (above.items[0], below.items[1]), (), below.variable)
    return Parts("list", tuple(items))


def _assigned(names: Sequence[str], values: Sequence[str]) -> Parts:
    """Returns the values in the order of their names, a point where that order is sure: `y=2, x=1` is one."""
    pairs = sorted(zip(names, values, strict=True))
    neighbours = all(ord(after[0]) - ord(before[0]) <= 1 for (before, _), (after, _) in pairwise(pairs))
    kind = "()" if neighbours or [name for name, _ in pairs] == list(names) else "named"
    return Parts(kind, tuple(value for _, value in pairs), tuple(name for name, _ in pairs))


def _bracketed(body: str) -> Parts | None:
    r"""Reads `(1,2)`, `[0,1)`, `\{1\}`, but not `(x+1)(x-2)`, and not `(5)`, which is a number."""
    depth = 0
    for found in _MARK.finditer(body):
        depth += (found[0] in _OPEN) - (found[0] in _SHUT)
        if depth == 0:
            break
    opening, closing = (r"\{", r"\}") if body.startswith(r"\{") else (body[0], body[-1])
    if depth or opening not in _OPEN or found.end() != len(body) or found[0] != closing:
        return None
    items = _split(body[len(opening) : len(body) - len(closing)], "and")
    if opening == r"\{":
        return Parts(r"\{\}", tuple(items))
    if len(items) < 2:
        return None
    listed = _list("", items)
    return listed if listed.names else Parts(opening + closing, tuple(items))


def _range(body: str) -> Parts | None:
    """Reads `x>2`, `2<=x`, `1<x<2` and `x!=2` as intervals of the variable."""
    marks = list(_COMPARISON.finditer(body))
    if not 1 <= len(marks) <= 2:
        return None
    ends = [0, *(place for mark in marks for place in mark.span()), len(body)]
    sides = [body[start:end].strip() for start, end in zip(ends[::2], ends[1::2], strict=True)]
    signs = [mark[1] or {"<": "lt", ">": "gt"}[mark[2]] for mark in marks]
    closed = [mark[1] in ("le", "ge") or bool(mark[3]) for mark in marks]
    if signs[-1] in ("ge", "gt"):  # now the lower end comes first
        sides, signs, closed = sides[::-1], signs[::-1], closed[::-1]
        signs = [{"ge": "le", "gt": "lt", "le": "ge", "lt": "gt", "ne": "ne"}[sign] for sign in signs]
    if len(sides) == 2:
        variables = [bool(_VARIABLE.fullmatch(side)) for side in sides]
        if sum(variables) != 1:
            return None
        variable, end = sides if variables[0] else sides[::-1]
        if signs == ["ne"]:
            return Parts("union", (f"({_LOWEST},{end})", f"({end},{_HIGHEST})"), (), variable)
        if variables[0]:
            return Parts("(" + ")]"[closed[0]], (_LOWEST, end), (), variable)
        return Parts("(["[closed[0]] + ")", (end, _HIGHEST), (), variable)
    if not set(signs) <= {"le", "lt"} or not _VARIABLE.fullmatch(sides[1]):
        return None
    return Parts("(["[closed[0]] + ")]"[closed[1]], (sides[0], sides[2]), (), sides[1])
