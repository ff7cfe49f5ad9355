"""Rollouts of known size: an engine wrapper that fixes the number of tokens in each segment of a trace.

Everything else is real: the wrapped engine's forward passes, caches, forks and joins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_parallel_r1.rollout.engine import Completion, Engine, Sampling
from megatron_parallel_r1.thought.tags import Tags


@dataclass(frozen=True, slots=True)
class Pace:
    """Tokens sampled on the main chain up to a block or the end, in a path, and in a summary.

    Each count includes the closing tag or end of sequence and is at least 2.
    """

    main: int
    path: int
    summary: int

    def trace(self, paths: int, blocks: int = 1) -> int:
        """Tokens of a whole response; `<Path>` and, after the paths, `</Parallel> <Summary>` are forced."""
        return self.main * (blocks + 1) + blocks * (paths * (self.path + 1) + 2 + self.summary)


class Paced:
    """Opens a block wherever one is allowed, and closes each segment after its number of tokens.

    The closing token is written, not sampled, and its log-prob is reported as 0: a trainer's comparison with
    it is meaningless but costs the same.
    """

    def __init__(self, engine: Engine[Any], tags: Tags, pace: Pace) -> None:
        self._engine, self._tags, self._pace = engine, tags, pace

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

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
        no_tokens: frozenset[int] = frozenset()
        drawn = await self._engine.sample(context, sampling, length - 1, no_tokens, suppress | stop)
        await self._engine.write(context, (closing,))
        return Completion(
            (*drawn.tokens, closing), (*drawn.logprobs, 0.0), (*drawn.versions, drawn.versions[-1]), True
        )
