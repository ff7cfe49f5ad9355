"""Parses the text of a trace with the parser of `thought`, without a tokenizer.

Each tag counts as one token, and so does each piece of text between tags.

The engine forces `<Path>` directly after `<Parallel>` or `</Path>`, `</Parallel>` after the last `</Path>`,
and `<Summary>` after `</Parallel>`. White space between these tags would train tokens that no rollout
contains, so `canonical` removes it. All other white space belongs to the text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_parallel_r1.thought.parser import ParseError, parse
from megatron_parallel_r1.thought.tags import TAG_TEXTS, Tags
from megatron_parallel_r1.thought.tree import Path, Summary, Tree

_TAG = re.compile("(" + "|".join(map(re.escape, TAG_TEXTS)) + ")")
_TAGS = Tags(*range(len(TAG_TEXTS) + 1))
_TEXT = len(TAG_TEXTS) + 1
_FORCED_GAP = re.compile(
    r"(?<=<Parallel>)\s+(?=<Path>)"
    r"|(?<=</Path>)\s+(?=<Path>|</Parallel>)"
    r"|(?<=</Parallel>)\s+(?=<Summary>)"
)
# Characters of context that an error message quotes on each side.
_CONTEXT_CHARS = 48


@dataclass(frozen=True, slots=True)
class WrittenTrace:
    """A trace as text, well-formed if it was parsed strictly.

    Attributes:
        pieces: the text split at its tags, none empty; the indices of `tree` count pieces.
    """

    pieces: tuple[str, ...]
    tree: Tree

    @classmethod
    def of(cls, text: str, strict: bool = True) -> WrittenTrace:
        """Parses text, canonical if `strict`.

        Raises:
            ParseError: the text is malformed and `strict` is set; `index` counts pieces.
        """
        pieces = _split(text)
        tokens = [TAG_TEXTS.index(piece) if piece in TAG_TEXTS else _TEXT for piece in pieces]
        return cls(pieces, parse(tokens, _TAGS, strict))

    @staticmethod
    def around(text: str, index: int) -> tuple[str, str]:
        """Splits the text before the piece that a `ParseError` names."""
        pieces = _split(text)
        return "".join(pieces[:index]), "".join(pieces[index:])

    def text(self, start: int, stop: int) -> str:
        return "".join(self.pieces[start:stop])

    def inside(self, part: Path | Summary) -> str:
        """Returns the text between the tags of a path or a summary."""
        return self.text(part.start + 1, part.stop - 1)

    @property
    def main(self) -> str:
        """The text outside blocks and summaries, the only place where an answer counts."""
        return "\n".join(self.text(start, stop) for start, stop in self.tree.main_spans())


def canonical(text: str) -> str:
    """Removes white space between tags that the engine places side by side."""
    return _FORCED_GAP.sub("", text)


def describe_fault(text: str) -> str | None:
    """Describes the first fault in the tags of a canonical response; None without one."""
    try:
        WrittenTrace.of(text)
    except ParseError as error:
        before, after = WrittenTrace.around(text, error.index)
        position = f", at {after[:_CONTEXT_CHARS]!r}" if after else ""
        return f"{error.what}, after {before[-_CONTEXT_CHARS:]!r}{position}"
    return None


def _split(text: str) -> tuple[str, ...]:
    return tuple(piece for piece in _TAG.split(text) if piece)
