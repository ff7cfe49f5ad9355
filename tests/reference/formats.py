"""Random traces of any thinking format, each token with what its author saw, noted while it is written.

Nothing here uses the parser or the layout: a trace grows by the definition of its format and of the modes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from megatron_parallel_r1.thought.formats import FORMATS, PlanSection, ThinkingFormat
from megatron_parallel_r1.thought.tags import Tags

OWN = ThinkingFormat(
    name="own",
    open="[[",
    close="]]",
    plan=PlanSection("(-", "-)", end="=="),
    path="{{",
    path_end="}}",
    path_begin="  {{ V{number}:",
    joined="\n]]\n<<\n",
    summary="<<",
    summary_end=">>",
    bad_plan="end",
)
BEHIND = replace(OWN, name="behind", plan=None, joined="<<", behind="\n]]\n")
ALL = {**FORMATS, "own": OWN, "behind": BEHIND}
FIRST_TEXT, VOCABULARY = 14, 40


def tags_of(format: ThinkingFormat) -> Tags:
    """Ids from 0 for the tags, then eos; every character of a forced text is a token."""
    known: dict[str, int] = {}
    texts = tuple(
        (piece, tuple(known.setdefault(char, FIRST_TEXT + len(known)) for char in piece))
        for piece in format.plain_pieces()
    )
    assert FIRST_TEXT + len(known) <= VOCABULARY
    ids = {role: id for id, role in enumerate(format.roles)}
    absent = {role: None for role in ("parallel_end", "summary", "summary_end")}
    return Tags(**{**absent, **ids}, eos=FIRST_TEXT - 1, texts=texts, format=format)


@dataclass
class Context:
    """What the next token sees: of the isolated mode with its position, and of a stock engine."""

    sees: list[int] = field(default_factory=list)
    position: int = 0
    stock: list[int] = field(default_factory=list)

    def copy(self) -> Context:
        return Context(list(self.sees), self.position, list(self.stock))


@dataclass
class WrittenTrace:
    """Tokens with the context of each; `planned` are the paths of each block, in order of their ends."""

    tags: Tags
    tokens: list[int] = field(default_factory=list)
    forced: list[bool] = field(default_factory=list)
    sees: list[list[int]] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    stock: list[list[int]] = field(default_factory=list)
    paths: list[int] = field(default_factory=list)

    def write(self, context: Context, tokens: Sequence[int | None], forced: bool = False) -> None:
        for token in tokens:
            assert token is not None
            index = len(self.tokens)
            self.tokens.append(token)
            self.forced.append(forced)
            self.sees.append(list(context.sees))
            self.positions.append(context.position)
            self.stock.append(list(context.stock))
            context.sees.append(index)
            context.position += 1
            context.stock.append(index)

    def cut(self, length: int) -> WrittenTrace:
        columns = (self.tokens, self.forced, self.sees, self.positions, self.stock)
        return WrittenTrace(self.tags, *(column[:length] for column in columns), self.paths)

    @property
    def cuts(self) -> list[int]:
        """Lengths at which an engine can stop: before a token that the policy would have drawn."""
        return [n for n in range(1, len(self.tokens)) if not self.forced[n]] + [len(self.tokens)]


def write_trace(format: ThinkingFormat, seed: int, depth: int = 2, refuse: bool = False) -> WrittenTrace:
    """A random trace: 1 to 8 paths (as the format allows), up to two blocks on a level.

    Args:
        refuse: let some plans have no item, or too many; the chain goes on behind them.
    """
    rng, tags = random.Random(seed), tags_of(format)
    written = WrittenTrace(tags)

    def text(context: Context) -> None:
        # Characters of forced texts among them: alone they mean nothing.
        written.write(context, [rng.randrange(FIRST_TEXT, VOCABULARY) for _ in range(rng.randint(0, 3))])

    def plan(context: Context, items: int) -> None:
        if tags.plan_begin is not None:
            text(context)
            written.write(context, [tags.plan_begin])
        for _ in range(items):
            text(context)
            written.write(context, [tags.item])
            text(context)
            written.write(context, [tags.item_end])
        text(context)
        written.write(context, [tags.plan_end])

    def block(context: Context, level: int) -> None:
        written.write(context, [tags.parallel])
        count = rng.randint(1, format.max_paths)
        if format.plan is not None:
            refused = refuse and rng.random() < 0.5
            plan(context, rng.choice([0, format.max_paths + 1]) if refused else count)
            if refused:
                return
        fork, first = context.copy(), len(written.tokens)
        inner = rng.sample(range(count), min(count, 2))
        for number in range(count):
            path = fork.copy()
            written.write(path, tags.path_begin(number + 1), forced=True)
            chain(path, level - 1 if number in inner else 0)
            written.write(path, [tags.path_end])
            context.sees += path.sees[len(fork.sees) :]
            context.position = max(context.position, path.position)
        context.stock += range(first, len(written.tokens))
        written.write(context, tags.joined, forced=True)
        if tags.summary is not None:
            text(context)
            written.write(context, [tags.summary_end])
            written.write(context, tags.behind, forced=True)
        written.paths.append(count)

    def chain(context: Context, level: int) -> None:
        text(context)
        for _ in range(rng.randint(0, 2) if level else 0):
            block(context, level)
            text(context)

    main = Context()
    chain(main, depth)
    written.write(main, [tags.eos])
    return written
