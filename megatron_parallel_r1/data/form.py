"""Whether a written trace is well-formed, asked of the project's one parser before any tokenizer exists."""

from __future__ import annotations

import re

from megatron_parallel_r1.thought.parser import ParseError, parse
from megatron_parallel_r1.thought.tags import TAG_TEXTS, Tags

_TAG = re.compile("(" + "|".join(map(re.escape, TAG_TEXTS)) + ")")
_TAGS = Tags(*range(len(TAG_TEXTS)), eos=len(TAG_TEXTS))
_TEXT = len(TAG_TEXTS) + 1
_SHOWN = 48


def malformed(text: str) -> str | None:
    """What is wrong with the tags of a canonical response, and where; None if nothing is."""
    pieces = [piece for piece in _TAG.split(text) if piece]
    tokens = [TAG_TEXTS.index(piece) if piece in TAG_TEXTS else _TEXT for piece in pieces]
    try:
        parse(tokens, _TAGS, strict=True)
    except ParseError as error:
        before = "".join(pieces[: error.index])[-_SHOWN:]
        after = "".join(pieces[error.index :])[:_SHOWN]
        return f"{error.what}, behind {before!r}" + (f", at {after!r}" if after else "")
    return None
