"""Parses the text of a trace with the parser of `thought`, without a tokenizer.

Each tag counts as one token, and so does each piece of text between tags; text that a format forces is a
piece of its own.

The engine forces `<Path>` directly after `<Parallel>` or `</Path>`, `</Parallel>` after the last `</Path>`,
and `<Summary>` after `</Parallel>`; other formats force other texts. Other white space there would train
tokens that no rollout contains, so `canonical` replaces it by the format's. All other white space belongs to
the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from megatron_parallel_r1.thought.formats import MAX_PATHS, NUMBER, PARALLEL_R1, ThinkingFormat
from megatron_parallel_r1.thought.parser import ParseError, parse
from megatron_parallel_r1.thought.tags import Tags
from megatron_parallel_r1.thought.tree import Path, Summary, Tree

# Characters of context that an error message quotes on each side.
_CONTEXT_CHARS = 48


@dataclass(frozen=True, slots=True)
class WrittenTrace:
    """A trace as text, well-formed if it was parsed strictly.

    Attributes:
        pieces: the text split at tags and forced texts, none empty; the indices of `tree` count pieces.
    """

    pieces: tuple[str, ...]
    tree: Tree

    @classmethod
    def of(cls, text: str, strict: bool = True, format: ThinkingFormat = PARALLEL_R1) -> WrittenTrace:
        """Parses text, canonical if `strict`.

        Raises:
            ParseError: the text is malformed and `strict` is set; `index` counts pieces.
        """
        pieces, tags = split_forced(text, format), _pseudo_tags(format)
        known = {piece: token for piece, (token,) in tags.texts} | dict(
            zip(format.tags, tags.ids, strict=True)
        )
        tokens = [known.get(piece, tags.eos + 1) for piece in pieces]
        return cls(pieces, parse(tokens, tags, strict))

    @staticmethod
    def around(text: str, index: int, format: ThinkingFormat = PARALLEL_R1) -> tuple[str, str]:
        """Splits the text before the piece that a `ParseError` names."""
        pieces = split_forced(text, format)
        return "".join(pieces[:index]), "".join(pieces[index:])

    def text(self, start: int, stop: int) -> str:
        return "".join(self.pieces[start:stop])

    def inside(self, part: Path | Summary) -> str:
        """Returns the text between the tags of a closed path or summary."""
        return self.text(*part.inside)

    @property
    def main(self) -> str:
        """The text outside blocks and summaries, the only place where an answer counts."""
        return "\n".join(self.text(start, stop) for start, stop in self.tree.main_spans())


def canonical(text: str, format: ThinkingFormat = PARALLEL_R1) -> str:
    """Replaces white space where the engine forces tags by what the format has there."""
    for pattern, canonical_gap in _gaps(format):
        text = pattern.sub(canonical_gap, text)
    return text


def describe_fault(text: str, format: ThinkingFormat = PARALLEL_R1) -> str | None:
    """Describes the first fault in the tags of a canonical response; None without one."""
    try:
        WrittenTrace.of(text, format=format)
    except ParseError as error:
        before, after = WrittenTrace.around(text, error.index, format)
        position = f", at {after[:_CONTEXT_CHARS]!r}" if after else ""
        return f"{error.what}, after {before[-_CONTEXT_CHARS:]!r}{position}"
    return None


def split_forced(text: str, format: ThinkingFormat) -> tuple[str, ...]:
    """Splits a text at its tags, and at the text that the format forces around them; no piece is empty."""
    leads, trails = _edges(format)
    pieces: list[str] = []
    tags = format.split(text)
    for before, piece, after in zip(["", *tags], tags, [*tags[1:], ""], strict=False):
        trail = next((trail for trail in trails.get(before, ()) if piece.startswith(trail)), "")
        rest = piece.removeprefix(trail)
        lead = leads.get(after, "") if rest.endswith(leads.get(after, "")) else ""
        pieces += [part for part in (trail, rest.removesuffix(lead), lead) if part]
    return tuple(pieces)


@lru_cache
def _pseudo_tags(format: ThinkingFormat) -> Tags:
    """Ids of a format's tags, of an eos behind them, and behind other text (eos + 1) of each forced text."""
    eos = len(format.tags)
    texts = tuple((piece, (eos + 2 + index,)) for index, piece in enumerate(format.plain_pieces()))
    return Tags.from_ids(format, range(eos), eos, texts=texts)


@lru_cache
def _edges(format: ThinkingFormat) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """The text forced before a tag, and the texts that may be forced behind it."""
    leads: dict[str, str] = {}
    trails: dict[str, tuple[str, ...]] = {}
    forced = [*(format.begin_of(number + 1) for number in range(MAX_PATHS)), format.joined, format.behind]
    for text in forced:
        pieces = format.split(text)
        for before, piece, after in zip(["", *pieces], pieces, [*pieces[1:], ""], strict=False):
            if piece in format.tags:
                continue
            if after:
                leads[after] = piece
            else:
                trails[before] = (*trails.get(before, ()), piece)
    return leads, trails


@lru_cache
def _gaps(format: ThinkingFormat) -> tuple[tuple[re.Pattern[str], str], ...]:
    """Patterns of white space around what is forced, and what stands there in canonical text."""
    return tuple(_find_gaps(format))


def _find_gaps(format: ThinkingFormat) -> Iterator[tuple[re.Pattern[str], str]]:
    lead, _, trail = format.path_begin.partition(format.path)
    closings = [(format.path_end, format.joined), (format.summary_end or "", format.behind)]
    texts = [(format.fork, lead + format.path), (format.path_end, lead + format.path), *closings]
    for before, text in texts:
        for piece in format.split(text):
            if piece not in format.tags:
                continue
            between = text[: text.index(piece)]
            quantifier = "*" if between else "+"
            yield re.compile(rf"(?<={re.escape(before)})\s{quantifier}(?={re.escape(piece)})"), between
            before, text = piece, text.partition(piece)[2]
        if text:
            yield re.compile(rf"(?<={re.escape(before)})\s*"), text
    if trail:
        number = r"\s*".join(map(re.escape, trail.split())).replace(re.escape(NUMBER), r"\s*(\d+)\s*")
        template = trail.replace("\\", r"\\").replace(NUMBER, r"\1")
        yield re.compile(rf"(?<={re.escape(format.path)})\s*{number}"), template
