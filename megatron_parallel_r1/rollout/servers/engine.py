"""An engine over a pool of rollout servers: a context is a list of tokens, the rest is in their caches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from uuid import uuid4

import torch

from megatron_parallel_r1.rollout.engine import Completion, Sampling
from megatron_parallel_r1.rollout.joined_blocks import Joined
from megatron_parallel_r1.rollout.servers.client import Asked
from megatron_parallel_r1.rollout.servers.pool import Pool
from megatron_parallel_r1.thought.layout import Mode

Publish = Callable[[Iterable[tuple[str, torch.Tensor]], int], None]


@dataclass(slots=True)
class ServerContext:
    """A written prefix.

    Attributes:
        tokens: all of it, flat.
        trace: the trace that it is part of; None: a prompt that traces will fork.
        joined: the isolated blocks that it has closed, in order of their forks.
    """

    tokens: list[int]
    trace: str | None = None
    joined: tuple[Joined, ...] = ()


class ServerEngine:
    """Implements `base.Engine`. Exact in the modes that all of the pool's servers are exact in.

    Nothing is sent by `write`, `fork` and `join`: the next `sample` brings all that a server has not seen.

    Args:
        pool: that has met its servers.
        publish: brings weights (Hugging Face name, tensor) of a version to every server of the pool, and
            tells the pool; None: the servers keep what they were started with.
    """

    # One process of a copy of the model asks for all.
    together = False

    def __init__(self, pool: Pool, publish: Publish | None = None) -> None:
        self.pool = pool
        self._publish = publish
        # A pool may serve several engines.
        self._names = (f"{uuid4().hex}-{number}" for number in count())

    @property
    def modes(self) -> frozenset[Mode]:
        return self.pool.modes

    @property
    def version(self) -> int:
        return self.pool.version

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """See `Engine`.

        Raises:
            RuntimeError: the engine was made for servers that keep their weights.
        """
        if self._publish is None:
            raise RuntimeError("these servers keep the weights that they were started with")
        self._publish(tensors, version)

    def offer_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """See `Engine`. What is under way is paused, retracted or finished, as the publisher is set."""
        self.load_weights(tensors, version)

    def interrupt(self) -> None:
        self.pool.interrupt()

    def open(self) -> ServerContext:
        return ServerContext([])

    async def write(self, context: ServerContext, tokens: Sequence[int]) -> None:
        context.tokens += tokens

    async def sample(
        self,
        context: ServerContext,
        sampling: Sampling,
        limit: int,
        stop: frozenset[int],
        suppress: frozenset[int],
    ) -> Completion:
        """See `Engine`.

        Raises:
            Interrupted: somebody called `interrupt`.
            UserError: no server is left, or they refuse what is asked.
        """
        assert limit >= 1, "a completion has at least one token"
        assert context.tokens, "nothing to continue: write something first"
        context.trace = context.trace or self._name()
        asked = Asked(tuple(context.tokens), sampling, limit, stop, suppress, context.trace, context.joined)
        completion = (await self.pool.generate(asked)).completion
        context.tokens += completion.tokens
        return completion

    def fork(self, context: ServerContext) -> ServerContext:
        """The forks of a prompt are the beginnings of traces, those of a trace its paths."""
        return ServerContext(list(context.tokens), context.trace or self._name(), context.joined)

    def join(self, trunk: ServerContext, paths: Sequence[ServerContext]) -> ServerContext:
        fork = len(trunk.tokens)
        tokens, ends, inside = list(trunk.tokens), [], []
        for path in paths:
            shift = len(tokens) - fork
            inside += [_shifted(block, shift) for block in path.joined[len(trunk.joined) :]]
            tokens += path.tokens[fork:]
            ends.append(len(tokens))
        joined = (*trunk.joined, Joined(fork, tuple(ends)), *inside)
        return ServerContext(tokens, trunk.trace, joined)

    def close(self, context: ServerContext) -> None:
        """The servers drop what is used least by themselves."""

    def _name(self) -> str:
        return next(self._names)


def _shifted(block: Joined, by: int) -> Joined:
    return replace(block, fork=block.fork + by, ends=tuple(end + by for end in block.ends))
