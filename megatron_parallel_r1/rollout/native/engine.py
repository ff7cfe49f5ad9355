"""The native engine: collects what all contexts ask for, and serves it one batched pass at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from megatron_parallel_r1.rollout.base import Completion, Sampling
from megatron_parallel_r1.rollout.native.cache import SlotTable
from megatron_parallel_r1.rollout.native.model import Architecture, DecodeModel
from megatron_parallel_r1.rollout.native.sampler import draw
from megatron_parallel_r1.thought.layout import Mode


@dataclass(slots=True)
class NativeContext:
    """A row of the slot table.

    Attributes:
        position: of the next token.
        pending: tokens that are part of the context but not in the cache yet.
        logits_V: for the next token, once nothing is pending.
    """

    row: int
    position: int = 0
    pending: list[int] = field(default_factory=list)
    logits_V: torch.Tensor | None = None


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


class NativeEngine:
    """Exact in every mode. `computed_tokens` counts the rows that went through the model.

    Args:
        architecture: of the model whose weights `load_weights` will bring.
        max_rows: tokens in one pass at most; longer prompts take several.
    """

    modes: frozenset[Mode] = frozenset({"isolated", "replay", "causal", "sequential"})

    def __init__(self, architecture: Architecture, max_rows: int = 1024) -> None:
        self.version = -1
        self.computed_tokens = 0
        self._architecture = architecture
        self._max_rows = max_rows
        self._table = SlotTable()
        self._model: DecodeModel | None = None
        self._requests: list[_Request] = []
        self._driver: asyncio.Task[None] | None = None

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Copies new weights.

        Raises:
            RuntimeError: a context is still open; its cache would mix two weights.
        """
        if self._table.used:
            raise RuntimeError(f"{self._table.used} cache slots are in use; close all contexts first")
        self._model = DecodeModel(self._architecture, tensors, self._table.slot_count)
        self.version = version

    def open(self) -> NativeContext:
        return NativeContext(self._table.open())

    def fork(self, context: NativeContext) -> NativeContext:
        assert not context.pending, "write a context before forking it"
        row = self._table.fork(context.row)
        return NativeContext(row, context.position, logits_V=context.logits_V)

    def join(self, trunk: NativeContext, paths: Sequence[NativeContext]) -> NativeContext:
        assert not any(path.pending for path in paths), "write the paths before joining them"
        row = self._table.join(trunk.row, [path.row for path in paths])
        return NativeContext(row, max(path.position for path in paths))

    def close(self, context: NativeContext) -> None:
        self._table.close(context.row)

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
            raise

    def _step(self) -> None:
        self._requests = [request for request in self._requests if not request.done.done()]
        self._forward([request for request in self._requests if request.context.pending])
        ready = [request for request in self._requests if not request.context.pending]
        drawing = [request for request in ready if request.limit]
        if drawing:
            self._draw(drawing)
        for request in ready:
            if not request.limit:
                request.done.set_result(None)
        self._requests = [request for request in self._requests if not request.done.done()]

    def _forward(self, requests: list[_Request]) -> None:
        """Brings pending tokens into the cache, up to `max_rows` of them in this pass."""
        counts, contexts, left = [], [], self._max_rows
        for request in requests:
            count = min(len(request.context.pending), left)
            if count:
                counts.append(count)
                contexts.append(request.context)
                left -= count
        if not contexts:
            return
        logits_CV = self._pass(contexts, counts)
        self.computed_tokens += sum(counts)
        for context, count, logits_V in zip(contexts, counts, logits_CV, strict=True):
            del context.pending[:count]
            context.position += count
            context.logits_V = logits_V

    def _pass(self, contexts: list[NativeContext], counts: list[int]) -> torch.Tensor:
        """One forward pass; the logits behind the last of each context's `counts` tokens, [C, V]."""
        if self._model is None:
            raise RuntimeError("the engine has no weights yet: call load_weights first")
        rows = np.repeat([context.row for context in contexts], counts)
        ends = np.cumsum(counts)
        steps = np.arange(ends[-1]) - np.repeat(ends - counts, counts)
        lengths_N = self._table.lengths_C[rows] + steps + 1
        slots_N = np.concatenate(
            [self._table.extend(c.row, count) for c, count in zip(contexts, counts, strict=True)]
        )
        if self._table.slot_count > len(self._model.cache_LSX[0]):
            self._model.grow(self._table.slot_count)
        tokens = [token for c, count in zip(contexts, counts, strict=True) for token in c.pending[:count]]
        positions_N = np.repeat([context.position for context in contexts], counts) + steps
        device = self._model.device
        return self._model.forward(
            tokens_N=torch.tensor(tokens, device=device),
            positions_N=torch.from_numpy(positions_N).to(device),
            slots_N=torch.from_numpy(slots_N).to(device),
            seen_NT=torch.from_numpy(self._table.slots_CT[rows, : lengths_N.max()]).to(device),
            lengths_N=torch.from_numpy(lengths_N).to(device),
            wanted=torch.from_numpy(ends - 1).to(device),
        )

    def _draw(self, requests: list[_Request]) -> None:
        tokens, logprobs = draw(
            torch.stack([request.context.logits_V for request in requests]),
            [request.sampling for request in requests],
            [request.context.position for request in requests],
            [request.suppress for request in requests],
        )
        for request, token, logprob in zip(requests, tokens, logprobs, strict=True):
            request.tokens.append(token)
            request.logprobs.append(logprob)
            request.context.pending.append(token)
            stopped = token in request.stop
            if stopped or len(request.tokens) == request.limit:
                completion = Completion(tuple(request.tokens), tuple(request.logprobs), stopped)
                request.done.set_result(completion)
