"""Rollouts of known size: an engine that is told how many tokens each stretch of a trace draws.

All other work is the real one: the wrapped engine's passes, caches, forks and joins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_parallel_r1.rollout.engine import Completion, Engine, Sampling, Wrapped
from megatron_parallel_r1.thought.tags import Tags


@dataclass(frozen=True, slots=True)
class Pace:
    """Tokens that are drawn on the main chain up to a block or the end, in a path, and in a summary; the tag
    or end of sequence behind each is included, so they are 2 or more."""

    main: int
    path: int
    summary: int

    def trace(self, paths: int, blocks: int = 1) -> int:
        """Tokens of a whole response; `<Path>` and, behind the paths, `</Parallel> <Summary>` are forced."""
        return self.main * (blocks + 1) + blocks * (paths * (self.path + 1) + 2 + self.summary)


class Paced(Wrapped[Any]):
    """Opens a block wherever one is allowed, and ends every stretch by its tag after so many tokens.

    The closing token is written, not drawn, and its log-prob is told as 0: what a trainer compares with it
    means nothing, and costs the same.
    """

    def __init__(self, engine: Engine[Any], tags: Tags, pace: Pace) -> None:
        super().__init__(engine)
        self._tags, self._pace = tags, pace

    def open(self) -> Any:
        return self._engine.open()

    async def write(self, context: Any, tokens: Sequence[int]) -> None:
        await self._engine.write(context, tokens)

    async def sample(
        self, context: Any, sampling: Sampling, limit: int, stop: frozenset[int], suppress: frozenset[int]
    ) -> Completion:
        tags = self._tags
        closing, length = tags.eos, self._pace.main
        if tags.path_end in stop:
            closing, length = tags.path_end, self._pace.path
        elif tags.summary_end in stop:
            closing, length = tags.summary_end, self._pace.summary
        elif tags.parallel in stop:
            closing = tags.parallel
        assert limit >= length, "the limits leave no room for the pace"
        none: frozenset[int] = frozenset()
        drawn = await self._engine.sample(context, sampling, length - 1, none, suppress | stop)
        await self._engine.write(context, (closing,))
        return Completion(
            (*drawn.tokens, closing), (*drawn.logprobs, 0.0), (*drawn.versions, drawn.versions[-1]), True
        )

    def fork(self, context: Any) -> Any:
        return self._engine.fork(context)

    def join(self, trunk: Any, paths: Sequence[Any]) -> Any:
        return self._engine.join(trunk, paths)

    def close(self, context: Any) -> None:
        self._engine.close(context)
