"""The one parser: a state machine over token ids that produces the tree of a trace.

Rollout loop, SFT data, packing and the format reward all read a trace through it. It knows five states:

    TEXT --<Parallel>--> BLOCK --<Path>--> PATH --</Path>--> BLOCK --</Parallel>--> JOINED
    JOINED --<Summary>--> SUMMARY --</Summary>--> the TEXT or PATH around the block
    PATH --<Parallel>--> BLOCK of a nested level

A trace may stop in any state (truncation is no error). A tag that a state does not know, or text where a
tag must stand, is an error in `strict` parsing; otherwise the token counts as text and a `Problem` says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass, field
from enum import Enum, auto

from megatron_parallel_r1.thought.tags import TAG_TEXTS, Tags
from megatron_parallel_r1.thought.tree import Block, Path, Problem, Summary, Tree


class State(Enum):
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
    """Feed it token by token; ask `state`, `depth` and `tree()` at any time.

    Args:
        tags: the ids to look for.
        strict: raise `ParseError` at the first malformed token instead of noting it.
    """

    def __init__(self, tags: Tags, strict: bool = False) -> None:
        self._names = dict(zip(astuple(tags), (*TAG_TEXTS, "eos"), strict=True))
        self._strict = strict
        self._state = State.TEXT
        self._open: list[_OpenBlock] = []
        self._blocks: list[Block] = []
        self._problems: list[Problem] = []
        self._length = 0

    @property
    def state(self) -> State:
        return self._state

    @property
    def depth(self) -> int:
        """Open blocks around the next token."""
        return len(self._open)

    def feed(self, token: int) -> None:
        """Takes the next token of the trace.

        Raises:
            ParseError: strict, and the token does not fit.
        """
        index = self._length
        self._length += 1
        name = self._names.get(token)
        if name == "eos":
            name = None
        if name is None and self._state is not State.BLOCK and self._state is not State.JOINED:
            return
        match self._state, name:
            case ((State.TEXT | State.PATH), "<Parallel>"):
                self._open.append(_OpenBlock(index))
                self._state = State.BLOCK
            case State.BLOCK, "<Path>":
                self._open[-1].path_start = index
                self._open[-1].path_blocks = []
                self._state = State.PATH
            case State.PATH, "</Path>":
                self._close_path(index + 1, closed=True)
                self._state = State.BLOCK
            case State.BLOCK, "</Parallel>" if self._open[-1].paths:
                self._open[-1].end = index
                self._state = State.JOINED
            case State.BLOCK, "</Parallel>":
                self._complain(index, "</Parallel> of a block without paths")
                self._open.pop()
                self._state = self._outer_state()
            case State.JOINED, "<Summary>":
                self._open[-1].summary_start = index
                self._state = State.SUMMARY
            case State.SUMMARY, "</Summary>":
                self._leave_block(Summary(self._open[-1].summary_start, index + 1, closed=True))
            case State.JOINED, _:
                self._complain(index, f"{name or 'text'} where <Summary> must follow </Parallel>")
                self._leave_block(None)
                self._length -= 1
                self.feed(token)
            case State.BLOCK, None:
                self._complain(index, "text between the paths of a block")
            case state, _:
                self._complain(index, f"{name} inside {_WHERE[state]}")

    def tree(self) -> Tree:
        """The tree of what was fed so far; open paths and summaries end at the last token, not closed."""
        blocks: tuple[Block, ...] = ()
        inner = self._state
        for depth in range(len(self._open) - 1, -1, -1):
            current = self._open[depth]
            paths = list(current.paths)
            if inner is State.PATH:
                path_blocks = (*current.path_blocks, *blocks)
                paths.append(Path(current.path_start, self._length, False, path_blocks))
            summary = None
            if inner is State.SUMMARY:
                summary = Summary(current.summary_start, self._length, closed=False)
            alone = Block(current.start, tuple(paths), current.end, summary) if paths else None
            blocks = (alone,) if alone else ()
            inner = State.PATH
        return Tree(self._length, (*self._blocks, *blocks), tuple(self._problems))

    def _outer_state(self) -> State:
        return State.PATH if self._open else State.TEXT

    def _close_path(self, stop: int, closed: bool) -> None:
        current = self._open[-1]
        current.paths.append(Path(current.path_start, stop, closed, tuple(current.path_blocks)))

    def _leave_block(self, summary: Summary | None) -> None:
        done = self._open.pop()
        block = Block(done.start, tuple(done.paths), done.end, summary)
        (self._open[-1].path_blocks if self._open else self._blocks).append(block)
        self._state = self._outer_state()

    def _complain(self, index: int, what: str) -> None:
        if self._strict:
            raise ParseError(index, what)
        self._problems.append(Problem(index, what))


_WHERE = {
    State.TEXT: "the main text",
    State.BLOCK: "a block, outside its paths",
    State.PATH: "a path",
    State.SUMMARY: "a summary",
}


def parse(tokens: Iterable[int], tags: Tags, strict: bool = False) -> Tree:
    """Parses a whole trace.

    Args:
        tokens: the flat response.
        strict: a malformed token raises; also a trace that ends inside a block.

    Raises:
        ParseError: strict, with the index of the token that does not fit.
    """
    parser = Parser(tags, strict)
    for token in tokens:
        parser.feed(token)
    tree = parser.tree()
    if strict and parser.state is not State.TEXT:
        raise ParseError(tree.length, f"the trace ends inside {_ENDS[parser.state]}")
    return tree


_ENDS = {**_WHERE, State.JOINED: "a block, before its <Summary>"}
