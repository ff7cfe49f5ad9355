"""The parser of traces: a state machine over token ids that produces the tree, for any format.

Rollout loop, SFT data, packing and the format reward all use it. Its states, with the tags of Parallel-R1:

    TEXT --<Parallel>--> BLOCK --<Path>--> PATH --</Path>--> BLOCK --</Parallel>--> JOINED
    JOINED --<Summary>--> SUMMARY --</Summary>--> the TEXT or PATH around the block
    PATH --<Parallel>--> BLOCK of a nested level

A format with a plan stands between the opening tag and BLOCK in OPENED (before the tag that begins the plan),
PLAN and ITEM; one that forces text behind a summary in CLOSING. A plan of too few or too many items is no
block: the text around it goes on.

A trace may stop in any state (truncation is no error). A tag that a state does not know, or text where a
tag or another forced text must stand, is an error in `strict` parsing; otherwise the token counts as text and
is recorded as a `ParseProblem`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from megatron_parallel_r1.thought.tags import Tags
from megatron_parallel_r1.thought.tree import Block, ParseProblem, Path, Summary, Tree


class ParserState(Enum):
    TEXT = auto()
    OPENED = auto()
    PLAN = auto()
    ITEM = auto()
    BLOCK = auto()
    PATH = auto()
    JOINED = auto()
    SUMMARY = auto()
    CLOSING = auto()


class ParseError(ValueError):
    """A strict parse met a malformed token; `index` is its place in the token list."""

    def __init__(self, index: int, what: str) -> None:
        super().__init__(f"token {index}: {what}")
        self.index = index
        self.what = what


@dataclass(slots=True)
class _OpenBlock:
    """A block under way; `*_begin` count the forced tokens at the begin of a part."""

    start: int
    items: int = 0
    planned: int | None = None
    paths: list[Path] = field(default_factory=list)
    path_start: int = -1
    path_begin: int = 0
    path_blocks: list[Block] = field(default_factory=list)
    end: int | None = None
    joined: int = 0
    summary_start: int | None = None
    summary_begin: int = 0
    summary_stop: int | None = None
    behind: int = 0

    def path(self, stop: int, closed: bool, inside: tuple[Block, ...] = ()) -> Path:
        blocks = (*self.path_blocks, *inside)
        return Path(self.path_start, stop, closed, blocks, self.path_begin)


class Parser:
    """An incremental parser; `state`, `depth`, `planned` and `tree()` are valid after every token.

    Args:
        tags: the token ids of the tags.
        strict: raise `ParseError` at the first malformed token instead of recording it.
    """

    def __init__(self, tags: Tags, strict: bool = False) -> None:
        self._tags = tags
        self._format = tags.format
        self._roles = dict(zip(tags.ids, tags.format.roles, strict=True))
        self._names = dict(zip(tags.ids, tags.format.tags, strict=True))
        self._joined, self._behind = tags.joined, tags.behind
        self._join_tag = next(token for token in self._joined if token in self._roles)
        self._leads = {tag: _before(tag, text) for tag, text in self._forks()}
        self._strict = strict
        self._state = ParserState.TEXT
        self._open: list[_OpenBlock] = []
        self._blocks: list[Block] = []
        self._problems: list[ParseProblem] = []
        self._length = 0
        self._expected: tuple[int, ...] = ()  # the rest of a forced text
        self._held: tuple[int, ...] = ()  # tokens between paths that may begin a forced text

    @property
    def state(self) -> ParserState:
        return self._state

    @property
    def depth(self) -> int:
        """The number of open blocks around the next token."""
        return len(self._open)

    @property
    def forks(self) -> bool:
        """Whether the engine forks behind the last token."""
        return self._state is ParserState.BLOCK and not self._open[-1].paths and not self._held

    @property
    def planned(self) -> int | None:
        """The paths that the plan of the innermost open block asks for; None without a complete plan."""
        return self._open[-1].planned if self._open else None

    def feed(self, token: int) -> None:
        """Parses the next token of the trace.

        Raises:
            ParseError: in strict mode, if the token is malformed here.
        """
        index = self._length
        self._length += 1
        if self._expected:
            if token == self._expected[0]:
                self._take_expected(token, index)
            else:
                self._miss_expected(token, index)
            return
        role = self._roles.get(token)
        if role is None and self._state is not ParserState.BLOCK:
            return
        match self._state, role:
            case ((ParserState.TEXT | ParserState.PATH), "parallel"):
                self._open.append(_OpenBlock(index))
                self._state = self._opened_state()
            case (ParserState.OPENED, "plan_begin") | (ParserState.ITEM, "item_end"):
                self._open[-1].items += self._state is ParserState.ITEM
                self._state = ParserState.PLAN
            case ParserState.PLAN, "item":
                self._state = ParserState.ITEM
            case ((ParserState.OPENED | ParserState.PLAN | ParserState.ITEM), "plan_end"):
                self._end_plan(index)
            case ((ParserState.OPENED | ParserState.PLAN | ParserState.ITEM), "path_end") if self.depth > 1:
                self._report(index, f"{self._names[token]} inside {_WHERE[self._state]}")
                self._abandon_block()
                self._feed_again(token)
            case ParserState.BLOCK, "path":
                self._begin_path(token, index)
            case ParserState.PATH, "path_end":
                self._open[-1].paths.append(self._open[-1].path(index + 1, closed=True))
                self._state = ParserState.BLOCK
            case ParserState.BLOCK, _ if token == self._join_tag:
                self._join(token, index)
            case ParserState.SUMMARY, "summary_end":
                self._open[-1].summary_stop = index + 1
                self._state, self._expected = ParserState.CLOSING, self._behind
                self._leave_if_complete()
            case ParserState.BLOCK, None:
                self._hold(token, index)
            case state, _:
                self._report(index, f"{self._names[token]} inside {_WHERE[state]}")

    def tree(self) -> Tree:
        """Returns the tree so far; open paths and summaries end, unclosed, at the last token."""
        blocks: tuple[Block, ...] = ()
        inner = self._state
        for current in reversed(self._open):
            paths = list(current.paths)
            if inner is ParserState.PATH:
                paths.append(current.path(self._length, False, blocks))
            blocks = (self._block(current, tuple(paths)),) if paths else ()
            inner = ParserState.PATH
        return Tree(self._length, (*self._blocks, *blocks), tuple(self._problems))

    def _forks(self) -> list[tuple[int, tuple[int, ...]]]:
        return [(self._tags.path, self._tags.path_begin(1)), (self._join_tag, self._joined)]

    def _opened_state(self) -> ParserState:
        if self._format.plan is None:
            return ParserState.BLOCK
        return ParserState.OPENED if self._format.plan.begin else ParserState.PLAN

    def _outer_state(self) -> ParserState:
        return ParserState.PATH if self._open else ParserState.TEXT

    def _end_plan(self, index: int) -> None:
        block, most = self._open[-1], self._format.max_paths
        if self._state is not ParserState.PLAN:
            self._report(index, f"{self._format.fork} inside {_WHERE[self._state]}")
        if 1 <= block.items <= most:
            block.planned, self._state = block.items, ParserState.BLOCK
            return
        self._report(index, f"a plan of {block.items} items, where 1 to {most} can be")
        self._abandon_block()

    def _abandon_block(self) -> None:
        self._open.pop()
        self._state = self._outer_state()

    def _begin_path(self, token: int, index: int) -> None:
        block, lead = self._open[-1], self._take_lead(token, index)
        number = len(block.paths) + 1
        if block.planned is not None and number > block.planned:
            self._report(index, f"path {number} of a plan of {block.planned}")
        block.path_start, block.path_begin, block.path_blocks = index - lead, lead + 1, []
        self._expected = _after(token, self._tags.path_begin(number))
        self._state = ParserState.PATH

    def _join(self, token: int, index: int) -> None:
        block = self._open[-1]
        if not block.paths:
            self._report(index, f"{self._names[token]} of a block without paths")
            self._held = ()
            self._abandon_block()
            return
        lead = self._take_lead(token, index)
        if block.planned is not None and len(block.paths) < block.planned:
            self._report(
                index, f"{self._names[token]} after {len(block.paths)} of {block.planned} planned paths"
            )
        block.end, block.joined = index - lead, lead
        self._state, self._expected = ParserState.JOINED, self._joined[lead:]
        self._take_expected(token, index)

    def _hold(self, token: int, index: int) -> None:
        """Keeps a token between paths while it may belong to a forced text, and reports it otherwise."""
        held = (*self._held, token)
        if any(lead[: len(held)] == held for lead in self._leads.values()):
            self._held = held
        else:
            self._held = ()
            self._report(index, "text between the paths of a block")

    def _take_lead(self, tag: int, index: int) -> int:
        """Counts the forced tokens before a tag."""
        held, self._held, lead = self._held, (), self._leads[tag]
        if held == lead:
            return len(lead)
        self._report(index, f"{self._names[tag]} without the text that must stand before it")
        return 0

    def _take_expected(self, token: int, index: int) -> None:
        self._expected = self._expected[1:]
        block = self._open[-1]
        match self._state:
            case ParserState.PATH:
                block.path_begin += 1
            case ParserState.CLOSING:
                block.behind += 1
            case _ if block.summary_start is not None:
                block.summary_begin += 1
            case _ if token == self._tags.summary:
                block.summary_start, block.summary_begin = index, 1
            case _:
                block.joined += 1
        self._leave_if_complete()

    def _miss_expected(self, token: int, index: int) -> None:
        missed, self._expected = self._expected[0], ()
        name = self._names.get(token, "text")
        what = self._names.get(missed, "the format's text")
        self._report(index, f"{name} where {what} must follow {self._last_tag()}")
        if self._state is ParserState.JOINED and self._open[-1].summary_start is not None:
            self._state = ParserState.SUMMARY
        elif self._state is not ParserState.PATH:
            self._leave_block()
        self._feed_again(token)

    def _last_tag(self) -> str:
        """The tag that a forced text under way follows."""
        if self._state is ParserState.PATH:
            return self._format.path
        if self._state is ParserState.CLOSING:
            return str(self._format.summary_end)
        begun = self._open[-1].summary_start is not None
        return str(self._format.summary) if begun else self._names[self._join_tag]

    def _leave_if_complete(self) -> None:
        if self._expected or self._state is ParserState.PATH:
            return
        if self._state is ParserState.JOINED and self._tags.summary is not None:
            self._state = ParserState.SUMMARY
        else:
            self._leave_block()

    def _leave_block(self) -> None:
        closed = self._open.pop()
        block = self._block(closed, tuple(closed.paths))
        (self._open[-1].path_blocks if self._open else self._blocks).append(block)
        self._state = self._outer_state()

    def _block(self, block: _OpenBlock, paths: tuple[Path, ...]) -> Block:
        summary = None
        if block.summary_start is not None:
            closed = block.summary_stop is not None
            stop = block.summary_stop if block.summary_stop is not None else self._length
            summary = Summary(block.summary_start, stop, closed, block.summary_begin)
        return Block(
            block.start,
            paths,
            block.end,
            summary,
            planned=block.planned,
            joined=block.joined if block.end is not None else 1,
            behind=block.behind,
            summarised=self._format.summary is not None,
        )

    def _feed_again(self, token: int) -> None:
        self._length -= 1
        self.feed(token)

    def _report(self, index: int, what: str) -> None:
        if self._strict:
            raise ParseError(index, what)
        self._problems.append(ParseProblem(index, what))


_WHERE = {
    ParserState.TEXT: "the main text",
    ParserState.OPENED: "a block, before its plan",
    ParserState.PLAN: "a plan, outside its items",
    ParserState.ITEM: "an item of a plan",
    ParserState.BLOCK: "a block, outside its paths",
    ParserState.PATH: "a path",
    ParserState.SUMMARY: "a summary",
}


def _before(tag: int, tokens: tuple[int, ...]) -> tuple[int, ...]:
    return tokens[: tokens.index(tag)]


def _after(tag: int, tokens: tuple[int, ...]) -> tuple[int, ...]:
    return tokens[tokens.index(tag) + 1 :]


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
        where = _WHERE.get(parser.state) or f"a block, {_before_end(parser.state, tags)}"
        raise ParseError(tree.length, f"the trace ends inside {where}")
    return tree


def _before_end(state: ParserState, tags: Tags) -> str:
    if state is ParserState.JOINED and tags.format.summary:
        return f"before its {tags.format.summary}"
    return "before the text that must follow"


def planned_paths(tokens: Sequence[int], tags: Tags) -> int | None:
    """Returns the number of paths that a plan asks for; None for a plan without a fork.

    Args:
        tokens: from the opening tag to the end of the plan.
    """
    parser = Parser(tags)
    for token in tokens:
        parser.feed(token)
    return parser.planned if parser.forks else None
