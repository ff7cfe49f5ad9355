"""Paths that name a sibling: text that no isolated path could have come by, since it never sees the others.

A path may say which one it is itself ("Second path: …"). What counts is the number or the ordinal of
another path of the block, or a word for the others as such. Only the noun `path` is looked for: a first
*method* is often one's own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

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
