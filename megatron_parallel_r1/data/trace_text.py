"""Reads the text of a written trace with the one parser, before any tokenizer exists.

A piece of text counts as one token, and so does a tag.

The engine forces `<Path>` directly after `<Parallel>` or `</Path>`, `</Parallel>` after the last `</Path>`,
and `<Summary>` after `</Parallel>`. White space between these tags would train tokens that no rollout
contains, so `canonical` removes it. All other white space is the author's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_parallel_r1.thought.parser import ParseError, parse
from megatron_parallel_r1.thought.tags import TAG_TEXTS, Tags
from megatron_parallel_r1.thought.tree import Path, Summary, Tree

_TAG = re.compile("(" + "|".join(map(re.escape, TAG_TEXTS)) + ")")
_TAGS = Tags(*range(len(TAG_TEXTS)), eos=len(TAG_TEXTS))
_TEXT = len(TAG_TEXTS) + 1
_FORCED_GAP = re.compile(
    r"(?<=<Parallel>)\s+(?=<Path>)"
    r"|(?<=</Path>)\s+(?=<Path>|</Parallel>)"
    r"|(?<=</Parallel>)\s+(?=<Summary>)"
)
# Characters of context that an error message quotes on each side.
_SHOWN = 48


@dataclass(frozen=True, slots=True)
class WrittenTrace:
    """A well-formed trace.

    Attributes:
        pieces: the text cut at its tags, none empty; `tree` counts in them.
    """

    pieces: tuple[str, ...]
    tree: Tree

    @classmethod
    def of(cls, text: str) -> WrittenTrace:
        """Reads canonical text.

        Raises:
            ParseError: it is malformed; `index` counts in the pieces.
        """
        pieces = _cut(text)
        tokens = [TAG_TEXTS.index(piece) if piece in TAG_TEXTS else _TEXT for piece in pieces]
        return cls(pieces, parse(tokens, _TAGS, strict=True))

    @staticmethod
    def around(text: str, index: int) -> tuple[str, str]:
        """The text before the piece that a `ParseError` names, and from that piece on."""
        pieces = _cut(text)
        return "".join(pieces[:index]), "".join(pieces[index:])

    def text(self, start: int, stop: int) -> str:
        return "".join(self.pieces[start:stop])

    def inside(self, part: Path | Summary) -> str:
        """The text between the tags of a path or a summary."""
        return self.text(part.start + 1, part.stop - 1)

    @property
    def main(self) -> str:
        """The text outside blocks and summaries; an answer counts only there."""
        return "\n".join(self.text(start, stop) for start, stop in self.tree.main_spans())


def canonical(text: str) -> str:
    """Returns `text` without white space between tags that the engine sets side by side."""
    return _FORCED_GAP.sub("", text)


def malformed(text: str) -> str | None:
    """Describes the first fault in the tags of a canonical response; None if there is none."""
    try:
        WrittenTrace.of(text)
    except ParseError as error:
        before, after = WrittenTrace.around(text, error.index)
        return f"{error.what}, after {before[-_SHOWN:]!r}" + (f", at {after[:_SHOWN]!r}" if after else "")
    return None


def _cut(text: str) -> tuple[str, ...]:
    return tuple(piece for piece in _TAG.split(text) if piece)
