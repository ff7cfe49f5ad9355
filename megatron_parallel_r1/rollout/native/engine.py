"""The native engine: collects what all contexts ask for, and serves it one batched pass at a time.

Under tensor parallelism each process runs an engine and asks it for the same, in the same order. What is
served when depends on the requests alone, so the engines stay in step; what is drawn, rank 0 says.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from megatron_parallel_r1.rollout.base import Completion, Interrupted, Sampling
from megatron_parallel_r1.rollout.native.cache import SlotTable
from megatron_parallel_r1.rollout.native.graphs import Decoder, Decoding
from megatron_parallel_r1.rollout.native.model import Architecture, DecodeModel
from megatron_parallel_r1.rollout.native.sampler import draw
from megatron_parallel_r1.rollout.native.team import Team
from megatron_parallel_r1.thought.layout import Mode


@dataclass(slots=True)
class NativeContext:
    """A row of the slot table.

    Attributes:
        position: of the next token.
        pending: tokens that are part of the context but not in the cache yet.
        logits_V: for the next token, once nothing is pending; of a team, rank 0 alone has all of them.
        version: of the weights that made `logits_V`.
    """

    row: int
    position: int = 0
    pending: list[int] = field(default_factory=list)
    logits_V: torch.Tensor | None = None
    version: int = -1


@dataclass(slots=True)
class _Request:
    """One `write` (limit 0) or `sample` under way."""

    context: NativeContext
    done: asyncio.Future[Completion | None]
    sampling: Sampling = field(default_factory=Sampling)
    limit: int = 0
    stop: frozenset[int] = frozenset()
    suppress: frozenset[int] = frozenset()
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)


class NativeEngine:
    """Exact in every mode. `computed_tokens` counts the rows that went through the model.

    Args:
        architecture: of the model whose weights `load_weights` will bring.
        team: the processes that share the engine's weights; None for this process alone.
        max_rows: tokens in one pass at most; longer prompts take several.
        recurring: decode on shapes that recur, which CUDA graphs replay (graphs.py); None: where there is
            CUDA. Never for a team or a model with experts.

    Raises:
        UserError: the team's size does not divide the model's heads.
    """

    modes: frozenset[Mode] = frozenset({"isolated", "replay", "causal", "sequential"})
    together = True

    def __init__(
        self,
        architecture: Architecture,
        team: Team | None = None,
        max_rows: int = 1024,
        recurring: bool | None = None,
    ) -> None:
        self.version = -1
        self.computed_tokens = 0
        self._team = team or Team.alone()
        architecture.shared(self._team.size)
        self._architecture = architecture
        self._max_rows = max_rows
        recurring = torch.cuda.is_available() if recurring is None else recurring
        self._recurring = recurring and self._team.size == 1 and not architecture.experts_per_token
        self._decoder: Decoder | None = None
        self._table = SlotTable()
        self._model: DecodeModel | None = None
        self._requests: list[_Request] = []
        self._driver: asyncio.Task[None] | None = None
        self._offers: dict[int, list[tuple[str, torch.Tensor]]] = {}
        self._offering = threading.Lock()
        self._interrupted = False

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Copies new weights, of a team's each tensor this process's part.

        Raises:
            RuntimeError: a context is still open; its cache would mix two weights.
        """
        if self._table.used:
            raise RuntimeError(f"{self._table.used} cache slots are in use; close all contexts first")
        self._team.agree(0, ("weights", version))
        self._drop()
        self._model = DecodeModel(self._architecture, tensors, self._table.slot_count, self._team)
        self.version = version

    def offer_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Keeps new weights, which must not change any more, for the next pass; see `Engine`.

        A team takes them when all its ranks have been offered them. Until then they are kept beside those in
        use.
        """
        with self._offering:
            self._offers[version] = list(tensors)

    def interrupt(self) -> None:
        self._interrupted = True

    @property
    def cached_tokens(self) -> int:
        """Slots that open contexts hold."""
        return self._table.used

    def open(self) -> NativeContext:
        return NativeContext(self._table.open())

    def fork(self, context: NativeContext) -> NativeContext:
        assert not context.pending, "write a context before forking it"
        row = self._table.fork(context.row)
        return NativeContext(row, context.position, logits_V=context.logits_V, version=context.version)

    def join(self, trunk: NativeContext, paths: Sequence[NativeContext]) -> NativeContext:
        assert not any(path.pending for path in paths), "write the paths before joining them"
        row = self._table.join(trunk.row, [path.row for path in paths])
        return NativeContext(row, max(path.position for path in paths))

    def close(self, context: NativeContext) -> None:
        self._table.close(context.row)
        if not self._table.used:
            # A rank that is done must not go on alone while another still decodes.
            self._team.agree(0, ("closed", self.computed_tokens))

    async def write(self, context: NativeContext, tokens: Sequence[int]) -> None:
        context.pending += tokens
        if context.pending:
            await self._serve(_Request(context, asyncio.get_running_loop().create_future()))

    async def sample(
        self,
        context: NativeContext,
        sampling: Sampling,
        limit: int,
        stop: frozenset[int],
        suppress: frozenset[int],
    ) -> Completion:
        assert limit >= 1, "a completion has at least one token"
        assert context.pending or context.logits_V is not None, "nothing to continue: write something first"
        done = asyncio.get_running_loop().create_future()
        completion = await self._serve(_Request(context, done, sampling, limit, stop, suppress))
        assert completion is not None
        return completion

    async def _serve(self, request: _Request) -> Completion | None:
        self._requests.append(request)
        if self._driver is None or self._driver.done():
            self._driver = asyncio.ensure_future(self._drive())
        return await request.done

    async def _drive(self) -> None:
        """Passes until nobody asks. Between two, whoever was answered gets the time to ask again."""
        try:
            while self._requests:
                for _ in range(4):
                    await asyncio.sleep(0)
                self._step()
        except BaseException as error:
            for request in self._requests:
                if not request.done.done():
                    request.done.set_exception(error)
            self._requests.clear()
            if not isinstance(error, Exception):  # Of others, whoever asked was told.
                raise

    def _step(self) -> None:
        if self._interrupted:
            raise Interrupted("the engine was told to end")
        self._requests = [request for request in self._requests if not request.done.done()]
        counts = self._counts()
        with self._offering:
            newest = max(self._offers, default=self.version)
        if self._team.size > 1:
            work = [
                (request.context.position, request.limit, request.context.pending[:count])
                for request, count in zip(self._requests, counts, strict=True)
            ]
            newest = self._team.agree(len(work), work, newest)
        if newest > self.version:
            self._take_offer(newest)
        self._forward(counts)
        ready = [request for request in self._requests if not request.context.pending]
        drawing = [request for request in ready if request.limit]
        if drawing:
            self._draw(drawing)
        for request in ready:
            if not request.limit:
                request.done.set_result(None)
        self._requests = [request for request in self._requests if not request.done.done()]

    def _drop(self) -> None:
        """The old weights, and what was captured with them, make room before the new ones come."""
        self._model = self._decoder = None

    def _take_offer(self, version: int) -> None:
        """Swaps in weights that all ranks of the team have been offered; the cache stays."""
        with self._offering:
            tensors = self._offers[version]
            self._offers = {other: kept for other, kept in self._offers.items() if other > version}
        cache_LSX = self._model.cache_LSX if self._model else None
        self._drop()
        self._model = DecodeModel(self._architecture, tensors, 0, self._team)
        self._model.cache_LSX = cache_LSX or self._model.cache_LSX
        self.version = version

    def _counts(self) -> list[int]:
        """How many of each request's pending tokens go through the next pass: `max_rows` in all at most."""
        counts, left = [], self._max_rows
        for request in self._requests:
            counts.append(min(len(request.context.pending), left))
            left -= counts[-1]
        return counts

    def _forward(self, request_counts: list[int]) -> None:
        """Brings so many pending tokens of each request into the cache."""
        contexts = [r.context for r, count in zip(self._requests, request_counts, strict=True) if count]
        counts = [count for count in request_counts if count]
        if not contexts:
            return
        logits_CV = self._pass(contexts, counts)
        self.computed_tokens += sum(counts)
        for context, count, logits_V in zip(contexts, counts, logits_CV, strict=True):
            del context.pending[:count]
            context.position += count
            context.logits_V, context.version = logits_V, self.version

    def _pass(self, contexts: list[NativeContext], counts: list[int]) -> torch.Tensor:
        """One forward pass; the logits behind the last of each context's `counts` tokens, [C, V]."""
        if self._model is None:
            raise RuntimeError("the engine has no weights yet: call load_weights first")
        rows = np.repeat([context.row for context in contexts], counts)
        ends = np.cumsum(counts)
        steps = np.arange(ends[-1]) - np.repeat(ends - counts, counts)
        lengths_N = self._table.lengths_C[rows] + steps + 1
        slots_N = self._table.extend(rows, lengths_N - 1)
        if self._table.slot_count > len(self._model.cache_LSX[0]):
            self._model.grow(self._table.slot_count)
        tokens = [token for c, count in zip(contexts, counts, strict=True) for token in c.pending[:count]]
        positions_N = np.repeat([context.position for context in contexts], counts) + steps
        seen_NT = self._table.slots_CT[rows, : lengths_N.max()]
        if self._recurring and len(rows) == len(contexts):
            self._decoder = self._decoder or Decoder(self._model)
            return self._decoder.logits(
                Decoding(np.asarray(tokens), positions_N, slots_N, seen_NT, lengths_N)
            )
        device = self._model.device
        return self._model.forward(
            tokens_N=torch.tensor(tokens, device=device),
            positions_N=torch.from_numpy(positions_N).to(device),
            slots_N=torch.from_numpy(slots_N).to(device),
            seen_NT=torch.from_numpy(seen_NT).to(device),
            lengths_N=torch.from_numpy(lengths_N).to(device),
            wanted=torch.from_numpy(ends - 1).to(device),
        )

    def _draw(self, requests: list[_Request]) -> None:
        """One token for each; of a team rank 0 draws, so that rounding cannot make the ranks part ways."""
        tokens: list[int] = []
        logprobs: list[float] = []
        if self._team.rank == 0:
            tokens, logprobs = draw(
                torch.stack([request.context.logits_V for request in requests]),
                [request.sampling for request in requests],
                [request.context.position for request in requests],
                [request.suppress for request in requests],
            )
        if self._team.size > 1:
            drawn, logprobs = self._team.broadcast((tokens, logprobs), (2, len(requests)))
            tokens = [int(token) for token in drawn]
        for request, token, logprob in zip(requests, tokens, logprobs, strict=True):
            request.tokens.append(token)
            request.logprobs.append(logprob)
            request.versions.append(request.context.version)
            request.context.pending.append(token)
            stopped = token in request.stop
            if stopped or len(request.tokens) == request.limit:
                completion = Completion(
                    tuple(request.tokens), tuple(request.logprobs), tuple(request.versions), stopped
                )
                request.done.set_result(completion)
