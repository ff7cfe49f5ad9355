"""An engine that tells of every token, and of whose thought it is, while the thinking loop uses it.

It draws one token a call, so that each can be told at once; a draw depends on seed and position, so nothing
else changes. Who speaks follows from what the loop asks: a fork behind `<Parallel>` is a path, what is joined
goes on as the block's summary, and so on; see `_tell_written` and `_tell_drawn`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic

from megatron_parallel_r1.rollout.engine import Completion, Context, Engine, Interrupted, Sampling, Wrapped
from megatron_parallel_r1.thought.tags import Tags

# Whose token: () the main text, (2,) the tags and the summary of its second block, (2, 0) that block's first
# path, (2, 0, 1) the first block inside that path, and so on.
Place = tuple[int, ...]
Hear = Callable[[Place, int], None]


@dataclass(slots=True, eq=False)
class Strand(Generic[Context]):
    """A context and whose thought it holds.

    Attributes:
        place: where the next token belongs; None: it is a prompt's. Ends in -1 between `<Parallel>` and
            the first `<Path>`.
        blocks: that the text at `place` has opened.
    """

    inner: Context
    place: Place | None
    blocks: int = 0


class ListeningEngine(Wrapped[Context]):
    """An `Engine` for one trace; what the loop leaves open when it is cut short, `close_all` closes.

    Args:
        hear: told of each token of the trace, forced ones included, in order within a place.
    """

    def __init__(self, engine: Engine[Context], tags: Tags, hear: Hear) -> None:
        super().__init__(engine)
        self._tags = tags
        self._hear = hear
        self._open: set[Strand[Context]] = set()
        self._ended = False

    @staticmethod
    def prompt(inner: Context) -> Strand[Context]:
        """A written prompt, of which forks may be taken; its owner closes it."""
        return Strand(inner, None)

    def open(self) -> Strand[Context]:
        return self._kept(Strand(self._engine.open(), None))

    async def write(self, context: Strand[Context], tokens: Sequence[int]) -> None:
        self._check()
        await self._engine.write(context.inner, tokens)
        self._tell_written(context, tuple(tokens))

    async def sample(
        self,
        context: Strand[Context],
        sampling: Sampling,
        limit: int,
        stop: frozenset[int],
        suppress: frozenset[int],
    ) -> Completion:
        tokens: list[int] = []
        logprobs: list[float] = []
        versions: list[int] = []
        while True:
            self._check()
            drawn = await self._engine.sample(context.inner, sampling, 1, stop, suppress)
            tokens += drawn.tokens
            logprobs += drawn.logprobs
            versions += drawn.versions
            self._tell_drawn(context, drawn.tokens[0])
            if drawn.stopped or len(tokens) == limit:
                return Completion(tuple(tokens), tuple(logprobs), tuple(versions), drawn.stopped)

    def fork(self, context: Strand[Context]) -> Strand[Context]:
        place = context.place
        forked = Strand(self._engine.fork(context.inner), () if place is None else place, context.blocks)
        if place:
            # The next fork of the same trunk is the next path; `<Path>` moves each one on to its number.
            context.place = _next(place)
        return self._kept(forked)

    def join(self, trunk: Strand[Context], paths: Sequence[Strand[Context]]) -> Strand[Context]:
        inner = self._engine.join(trunk.inner, [path.inner for path in paths])
        return self._kept(Strand(inner, paths[0].place))

    def close(self, context: Strand[Context]) -> None:
        self._open.remove(context)
        self._engine.close(context.inner)

    def close_all(self) -> None:
        """Ends the trace: closes what is open, and whoever asks for more gets `Interrupted`."""
        self._ended = True
        for strand in tuple(self._open):
            self.close(strand)

    def _kept(self, strand: Strand[Context]) -> Strand[Context]:
        self._open.add(strand)
        return strand

    def _check(self) -> None:
        if self._ended:
            raise Interrupted("the trace was ended")

    def _tell_written(self, strand: Strand[Context], tokens: tuple[int, ...]) -> None:
        """Of the loop's writes only single tags and `</Parallel> <Summary>` are new text."""
        tags = self._tags
        if strand.place is None:
            return
        if tokens == (tags.path,):
            strand.place, strand.blocks = _next(strand.place), 0
        elif tokens == (tags.parallel_end, tags.summary):
            strand.place = strand.place[:-1]
        elif tokens not in ((tags.path_end,), (tags.summary_end,)):
            return
        for token in tokens:
            self._hear(strand.place, token)
        if tokens == (tags.summary_end,):
            self._leave_summary(strand)

    def _tell_drawn(self, strand: Strand[Context], token: int) -> None:
        assert strand.place is not None, "a prompt is forked, never continued"
        self._hear(strand.place, token)
        in_summary = len(strand.place) % 2 == 1
        if in_summary and token == self._tags.summary_end:
            self._leave_summary(strand)
        elif not in_summary and token == self._tags.parallel:
            strand.blocks += 1
            strand.place = (*strand.place, strand.blocks, -1)

    def _leave_summary(self, strand: Strand[Context]) -> None:
        assert strand.place
        strand.place, strand.blocks = strand.place[:-1], strand.place[-1]


def _next(place: Place) -> Place:
    return (*place[:-1], place[-1] + 1)
