"""An engine over a pool of rollout servers: a context is a list of tokens, their caches do the rest."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from types import MappingProxyType
from uuid import uuid4

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.engine import Completion, Sampling
from megatron_parallel_r1.rollout.joined_blocks import JoinedBlock
from megatron_parallel_r1.rollout.servers.client import INITIAL_VERSION, GenerateRequest, Server, Timeouts
from megatron_parallel_r1.rollout.servers.pool import PoolSettings, ServerPool
from megatron_parallel_r1.rollout.servers.sglang import SglangClient
from megatron_parallel_r1.rollout.servers.vllm import VllmClient
from megatron_parallel_r1.thought.layout import Mode
from megatron_parallel_r1.utils.rank import is_rank_zero

LOG = logging.getLogger(__name__)
CLIENTS: Mapping[str, Callable[[str, Timeouts, str | None], Server]] = MappingProxyType(
    {"sglang": SglangClient, "vllm": VllmClient}
)
Publish = Callable[[Iterable[tuple[str, torch.Tensor]], int], None]


@dataclass(slots=True)
class ServerContext:
    """A written prefix.

    Attributes:
        tokens: all of it, flat.
        trace: name of the trace that it is part of; None: a prompt that traces will fork.
        joined: the isolated blocks that it has closed, in order of their forks.
    """

    tokens: list[int]
    trace: str | None = None
    joined: tuple[JoinedBlock, ...] = ()


class ServerEngine:
    """Implements `Engine[ServerContext]`, exact in the modes that all servers of the pool are exact in.

    `write`, `fork` and `join` send nothing: the next `sample` carries the whole prefix.

    Args:
        pool: ready (`ServerPool.wait_ready`).
        publish: brings weights (Hugging Face name, tensor) of a version to every server of the pool, and
            records the version in the pool; None: the servers keep the weights that they were started with.
    """

    # The first process of a model replica sends all requests.
    runs_on_all_ranks = False

    def __init__(self, pool: ServerPool, publish: Publish | None = None) -> None:
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
            RuntimeError: the engine has no `publish`.
        """
        if self._publish is None:
            raise RuntimeError("these servers keep the weights that they were started with")
        self._publish(tensors, version)

    def offer_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """See `Engine`. Requests under way are paused, retracted or finished, by the publisher's settings."""
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
            Interrupted: `interrupt` was called.
            UserError: no server is left, or they refuse the request.
        """
        assert limit >= 1, "a completion has at least one token"
        assert context.tokens, "nothing to continue: write something first"
        context.trace = context.trace or next(self._names)
        request = GenerateRequest(
            tuple(context.tokens), sampling, limit, stop, suppress, context.trace, context.joined
        )
        completion = (await self.pool.generate(request)).completion
        context.tokens += completion.tokens
        return completion

    def fork(self, context: ServerContext) -> ServerContext:
        """A fork of a prompt begins a trace, a fork of a trace one of its paths."""
        return ServerContext(list(context.tokens), context.trace or next(self._names), context.joined)

    def join(self, trunk: ServerContext, paths: Sequence[ServerContext]) -> ServerContext:
        fork = len(trunk.tokens)
        tokens = list(trunk.tokens)
        ends: list[int] = []
        nested: list[JoinedBlock] = []
        for path in paths:
            shift = len(tokens) - fork
            nested += [_shifted(block, shift) for block in path.joined[len(trunk.joined) :]]
            tokens += path.tokens[fork:]
            ends.append(len(tokens))
        joined = (*trunk.joined, JoinedBlock(fork, tuple(ends)), *nested)
        return ServerContext(tokens, trunk.trace, joined)

    async def experts_of(self, context: ServerContext, count: int) -> NDArray[np.int16]:
        """See `RecordsExperts`: a request of its own, whose draw is thrown away.

        Each token's experts are sent once. With each continuation's, those of a block's paths would come
        twice: to the paths, and to the chain that has joined them.
        """
        assert context.trace is not None, "no trace has begun"
        known, first = tuple(context.tokens[:-1]), len(context.tokens) - count
        nothing: frozenset[int] = frozenset()
        request = GenerateRequest(
            known, Sampling(), 1, nothing, nothing, context.trace, context.joined, experts_from=first
        )
        experts = (await self.pool.generate(request)).experts
        return np.frombuffer(experts, np.int16).reshape(count - 1, -1)

    def close(self, context: ServerContext) -> None:
        """Does nothing: servers evict what was used least recently by themselves."""


def _shifted(block: JoinedBlock, by: int) -> JoinedBlock:
    return replace(block, fork=block.fork + by, ends=tuple(end + by for end in block.ends))


def connect_pool(
    engine: str,
    urls: Sequence[str],
    timeouts: Timeouts,
    settings: PoolSettings,
    urls_file: Path | None = None,
    share: tuple[int, int] = (0, 1),
    key: str | None = None,
    router: str | None = None,
) -> ServerPool:
    """A pool of the servers at these addresses, ready to use; warns of servers that ignore seeds.

    Args:
        share: rank and number of the processes that use the same servers; see `ServerPool.share`.
        key: the servers' API key.
        router: as of `ServerPool`.

    Raises:
        UserError: none answers within `settings.patience_s`, or their log-probs are not as required.
    """

    def connect(url: str) -> Server:
        return CLIENTS[engine](url, timeouts, key)

    pool = ServerPool(connect, urls, settings, urls_file, router=router)
    pool.share(*share)
    pool.wait_ready()
    unseeded = [url for url, info in pool.infos.items() if not info.seeded]
    if unseeded and is_rank_zero():
        LOG.warning(
            "warning: %s: seeds are ignored, so a repeated request draws anew; start servers with "
            "serve-rollout, without --no-deterministic",
            ", ".join(unseeded),
        )
    return pool


def check_checkpoint(pool: ServerPool, folder: Path) -> None:
    """Checks that the servers hold a checkpoint, unchanged since they were started with it.

    Raises:
        UserError: a server holds another checkpoint, or weights of an update.
    """
    for url, info in pool.infos.items():
        served = Path(info.model)
        updated = info.version != INITIAL_VERSION
        if updated or (served.exists() and served.resolve() != folder.resolve()):
            held = f"weights of update {info.version}" if updated else info.model
            raise UserError(f"{url} holds {held}, not {folder}; start it with that checkpoint")
