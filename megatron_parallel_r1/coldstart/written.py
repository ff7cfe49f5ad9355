"""A written trace as the one parser reads it, before any tokenizer exists: a piece of text is a token, a tag
is another."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_parallel_r1.thought.parser import parse
from megatron_parallel_r1.thought.tags import TAG_TEXTS, Tags
from megatron_parallel_r1.thought.tree import Path, Summary, Tree

_TAG = re.compile("(" + "|".join(map(re.escape, TAG_TEXTS)) + ")")
_TAGS = Tags(*range(len(TAG_TEXTS)), eos=len(TAG_TEXTS))
_TEXT = len(TAG_TEXTS) + 1


@dataclass(frozen=True, slots=True)
class Written:
    """A well-formed trace.

    Attributes:
        pieces: the text cut at its tags, none empty; `tree` counts in them.
    """

    pieces: tuple[str, ...]
    tree: Tree

    @classmethod
    def of(cls, text: str) -> Written:
        """Reads canonical text (`data/canonical.py`).

        Raises:
            ParseError: it is malformed.
        """
        pieces = _cut(text)
        tokens = [TAG_TEXTS.index(piece) if piece in TAG_TEXTS else _TEXT for piece in pieces]
        return cls(pieces, parse(tokens, _TAGS, strict=True))

    @staticmethod
    def around(text: str, index: int) -> tuple[str, str]:
        """The text before and from a piece of it on, where a `ParseError` names the piece."""
        pieces = _cut(text)
        return "".join(pieces[:index]), "".join(pieces[index:])

    def text(self, start: int, stop: int) -> str:
        return "".join(self.pieces[start:stop])

    def inside(self, part: Path | Summary) -> str:
        """What stands between the tags of a path or a summary."""
        return self.text(part.start + 1, part.stop - 1)

    @property
    def main(self) -> str:
        """The text outside blocks and summaries; an answer counts only there."""
        return "\n".join(self.text(start, stop) for start, stop in self.tree.main_spans())


def _cut(text: str) -> tuple[str, ...]:
    return tuple(piece for piece in _TAG.split(text) if piece)
