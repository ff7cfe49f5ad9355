"""The parser of traces: a state machine over token ids that produces the tree.

Rollout loop, SFT data, packing and the format reward all use it. It has five states:

    TEXT --<Parallel>--> BLOCK --<Path>--> PATH --</Path>--> BLOCK --</Parallel>--> JOINED
    JOINED --<Summary>--> SUMMARY --</Summary>--> the TEXT or PATH around the block
    PATH --<Parallel>--> BLOCK of a nested level

A trace may stop in any state (truncation is no error). A tag that a state does not know, or text where a
tag must stand, is an error in `strict` parsing; otherwise the token counts as text and is recorded as a
`ParseProblem`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, auto

from megatron_parallel_r1.thought.tags import TAG_TEXTS, Tags
from megatron_parallel_r1.thought.tree import Block, ParseProblem, Path, Summary, Tree


class ParserState(Enum):
    TEXT = auto()
    BLOCK = auto()
    PATH = auto()
    JOINED = auto()
    SUMMARY = auto()


class ParseError(ValueError):
    """A strict parse met a malformed token; `index` is its place in the token list."""

    def __init__(self, index: int, what: str) -> None:
        super().__init__(f"token {index}: {what}")
        self.index = index
        self.what = what


@dataclass(slots=True)
class _OpenBlock:
    start: int
    paths: list[Path] = field(default_factory=list)
    path_start: int = -1
    path_blocks: list[Block] = field(default_factory=list)
    end: int | None = None
    summary_start: int = -1


class Parser:
    """An incremental parser; `state`, `depth` and `tree()` are valid after every token.

    Args:
        tags: the token ids of the tags.
        strict: raise `ParseError` at the first malformed token instead of recording it.
    """

    def __init__(self, tags: Tags, strict: bool = False) -> None:
        self._names = dict(zip((*tags.ids, tags.eos), (*TAG_TEXTS, "eos"), strict=True))
        self._strict = strict
        self._state = ParserState.TEXT
        self._open: list[_OpenBlock] = []
        self._blocks: list[Block] = []
        self._problems: list[ParseProblem] = []
        self._length = 0

    @property
    def state(self) -> ParserState:
        return self._state

    @property
    def depth(self) -> int:
        """The number of open blocks around the next token."""
        return len(self._open)

    def feed(self, token: int) -> None:
        """Parses the next token of the trace.

        Raises:
            ParseError: in strict mode, if the token is malformed here.
        """
        index = self._length
        self._length += 1
        name = self._names.get(token)
        if name == "eos":
            name = None
        if name is None and self._state is not ParserState.BLOCK and self._state is not ParserState.JOINED:
            return
        match self._state, name:
            case ((ParserState.TEXT | ParserState.PATH), "<Parallel>"):
                self._open.append(_OpenBlock(index))
                self._state = ParserState.BLOCK
            case ParserState.BLOCK, "<Path>":
                self._open[-1].path_start = index
                self._open[-1].path_blocks = []
                self._state = ParserState.PATH
            case ParserState.PATH, "</Path>":
                self._close_path(index + 1, closed=True)
                self._state = ParserState.BLOCK
            case ParserState.BLOCK, "</Parallel>" if self._open[-1].paths:
                self._open[-1].end = index
                self._state = ParserState.JOINED
            case ParserState.BLOCK, "</Parallel>":
                self._report(index, "</Parallel> of a block without paths")
                self._open.pop()
                self._state = self._outer_state()
            case ParserState.JOINED, "<Summary>":
                self._open[-1].summary_start = index
                self._state = ParserState.SUMMARY
            case ParserState.SUMMARY, "</Summary>":
                self._leave_block(Summary(self._open[-1].summary_start, index + 1, closed=True))
            case ParserState.JOINED, _:
                self._report(index, f"{name or 'text'} where <Summary> must follow </Parallel>")
                self._leave_block(None)
                self._length -= 1
                self.feed(token)
            case ParserState.BLOCK, None:
                self._report(index, "text between the paths of a block")
            case state, _:
                self._report(index, f"{name} inside {_WHERE[state]}")

    def tree(self) -> Tree:
        """Returns the tree so far; open paths and summaries end, unclosed, at the last token."""
        blocks: tuple[Block, ...] = ()
        inner = self._state
        for depth in range(len(self._open) - 1, -1, -1):
            current = self._open[depth]
            paths = list(current.paths)
            if inner is ParserState.PATH:
                path_blocks = (*current.path_blocks, *blocks)
                paths.append(Path(current.path_start, self._length, False, path_blocks))
            summary = None
            if inner is ParserState.SUMMARY:
                summary = Summary(current.summary_start, self._length, closed=False)
            blocks = (Block(current.start, tuple(paths), current.end, summary),) if paths else ()
            inner = ParserState.PATH
        return Tree(self._length, (*self._blocks, *blocks), tuple(self._problems))

    def _outer_state(self) -> ParserState:
        return ParserState.PATH if self._open else ParserState.TEXT

    def _close_path(self, stop: int, closed: bool) -> None:
        current = self._open[-1]
        current.paths.append(Path(current.path_start, stop, closed, tuple(current.path_blocks)))

    def _leave_block(self, summary: Summary | None) -> None:
        closed = self._open.pop()
        block = Block(closed.start, tuple(closed.paths), closed.end, summary)
        (self._open[-1].path_blocks if self._open else self._blocks).append(block)
        self._state = self._outer_state()

    def _report(self, index: int, what: str) -> None:
        if self._strict:
            raise ParseError(index, what)
        self._problems.append(ParseProblem(index, what))


_WHERE = {
    ParserState.TEXT: "the main text",
    ParserState.BLOCK: "a block, outside its paths",
    ParserState.PATH: "a path",
    ParserState.SUMMARY: "a summary",
}


def parse(tokens: Iterable[int], tags: Tags, strict: bool = False) -> Tree:
    """Parses a whole trace.

    Args:
        tokens: the flat response.
        strict: raise on a malformed token and on a trace that ends inside a block.

    Raises:
        ParseError: in strict mode, with the index of the malformed token.
    """
    parser = Parser(tags, strict)
    for token in tokens:
        parser.feed(token)
    tree = parser.tree()
    if strict and parser.state is not ParserState.TEXT:
        raise ParseError(tree.length, f"the trace ends inside {_ENDS[parser.state]}")
    return tree


_ENDS = {**_WHERE, ParserState.JOINED: "a block, before its <Summary>"}
