r"""Finds the last `\boxed{…}` of a text, which marks the answer of a solution; one pass for any text."""

from __future__ import annotations

import re

_BRACES = re.compile(
    r"\\(?:boxed|fbox)\s{0,8}(?P<open>\{)"
    r"|\\(?:boxed|fbox)[ \t]{1,8}(?P<bare>[^\s${}\\]*[^\s${}\\.,;:])"
    r"|\\."
    r"|[{}]",
    re.DOTALL,
)


def last_box(text: str, before: int | None = None) -> str | None:
    r"""Returns the stripped content of the last closed, non-empty box; None without one.

    `\boxed 9`, without braces, counts too; of nested boxes the inner one counts.

    Args:
        before: consider only boxes that open before this index; None: all.
    """
    stop = len(text) if before is None else before
    spans: list[tuple[int, int]] = []
    braces: list[int | None] = []  # an open box's content start, None for an ordinary brace
    for token in _BRACES.finditer(text):
        if token["open"]:
            braces.append(token.end())
        elif token["bare"]:
            spans.append(token.span("bare"))
        elif token[0] == "{":
            braces.append(None)
        elif token[0] == "}" and braces and (start := braces.pop()) is not None:
            spans.append((start, token.start()))
    for start, end in sorted(spans, reverse=True):
        if start < stop and (content := text[start:end].strip()):
            return content
    return None
