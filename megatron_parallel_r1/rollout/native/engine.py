"""The native engine: collects the requests of all contexts and serves them one batched pass at a time.

Under tensor parallelism each rank runs an engine and sends it the same requests in the same order. Scheduling
depends on the requests alone, so the engines stay in step; rank 0 draws.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.rollout.engine import Completion, Interrupted, Sampling, TokenScore
from megatron_parallel_r1.rollout.native.graphs import GraphRunner
from megatron_parallel_r1.rollout.native.model import DecodeModel, local_config
from megatron_parallel_r1.rollout.native.page_table import ForwardBatch, NativeContext, Numbers, PageTable
from megatron_parallel_r1.rollout.native.prompt_scores import PromptScores, most_likely
from megatron_parallel_r1.rollout.native.running_batch import RunningBatch, SampleCall
from megatron_parallel_r1.rollout.native.sampler import sample_tokens, uniform_draws
from megatron_parallel_r1.rollout.native.tensor_parallel import TensorParallelGroup
from megatron_parallel_r1.thought.layout import Mode
from megatron_parallel_r1.utils.devices import to_device

T = TypeVar("T")
# Logits of scored prompts that one pass holds at once.
SCORED_LOGITS = 2**24


@dataclass(frozen=True, eq=False, slots=True)
class _Write:
    """One `write` under way."""

    context: NativeContext
    done: asyncio.Future[None]
    scores: PromptScores | None = None


class NativeEngine:
    """Exact in every mode. `computed_tokens` counts the rows that went through the model.

    Args:
        group: ranks that share the engine's weights; None: this process alone.
        max_rows: maximum tokens in one pass; longer prompts take several.
        recurring: decode on recurring shapes, which CUDA graphs replay (graphs.py); None: if CUDA is
            available. Ignored with tensor parallelism or experts.
        compiled: the model's layers go through torch.compile, which takes up to a minute at the first passes
            and, on a CPU, a C++ compiler.

    Raises:
        UserError: the group's size does not divide the model's heads.
    """

    modes: frozenset[Mode] = frozenset({"isolated", "replay", "causal", "sequential"})
    runs_on_all_ranks = True

    def __init__(
        self,
        config: ModelConfig,
        group: TensorParallelGroup | None = None,
        max_rows: int = 1024,
        recurring: bool | None = None,
        compiled: bool = False,
    ) -> None:
        self.version = -1
        self.computed_tokens = 0
        self._group = group or TensorParallelGroup.alone()
        local_config(config, self._group.size)
        self._config = config
        self._max_rows = max_rows
        self._compiled = compiled
        recurring = torch.cuda.is_available() if recurring is None else recurring
        self._recurring = recurring and self._group.size == 1 and not config.experts
        self._graphs: GraphRunner | None = None
        self._table = PageTable()
        self._model: DecodeModel | None = None
        self._writes: list[_Write] = []
        self._new_calls: list[SampleCall] = []
        self._running = RunningBatch()
        self._cancelled = False
        self._driver: asyncio.Task[None] | None = None
        self._offers: dict[int, list[tuple[str, torch.Tensor]]] = {}
        self._offers_lock = threading.Lock()
        self._interrupted = False

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Copies new weights, this rank's shard of each tensor.

        Raises:
            RuntimeError: a context is still open; its cache would mix two versions.
        """
        if self._table.used:
            raise RuntimeError(f"{self._table.used} cache slots are in use; close all contexts first")
        self._group.assert_in_step(0, ("weights", version))
        self._drop_model()
        self._model = self._new_model(tensors, self._table.slot_count)
        self.version = version

    def offer_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Keeps new weights, which must not change any more, for the next pass; see `Engine`.

        A tensor-parallel group takes them once all ranks have been offered them. Until then they are kept
        beside those in use.
        """
        with self._offers_lock:
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

    async def experts_of(self, context: NativeContext, count: int) -> NDArray[np.int16]:
        assert self._model is not None and self._model.chosen_LSC, "no experts were chosen"
        written = self._table.lengths_C[context.row]
        first = written + len(context.pending) - count
        slots_T = to_device(self._table.slots_CT[context.row, first:written], self._model.device)
        chosen_TLC = torch.stack([chosen_SC[slots_T] for chosen_SC in self._model.chosen_LSC], 1)
        return chosen_TLC.flatten(1).cpu().numpy()

    def close(self, context: NativeContext) -> None:
        self._table.close(context.row)
        if not self._table.used:
            # A rank that has finished must not go on alone while another still decodes.
            self._group.assert_in_step(0, ("closed", self.computed_tokens))

    async def write(self, context: NativeContext, tokens: Sequence[int]) -> None:
        context.pending += tokens
        if context.pending:
            write = _Write(context, asyncio.get_running_loop().create_future())
            self._writes.append(write)
            await self._result(write.done)

    async def score(
        self, context: NativeContext, tokens: Sequence[int], alternatives: int
    ) -> list[TokenScore]:
        """See `ScoresTokens`; not in a tensor-parallel group."""
        assert self._group.size == 1, "only one rank of a group has the logits"
        assert tokens and not context.position and not context.pending, "score an empty context"
        context.pending += tokens
        scores = PromptScores(list(tokens), alternatives)
        write = _Write(context, asyncio.get_running_loop().create_future(), scores)
        self._writes.append(write)
        await self._result(write.done)
        return scores.scores

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
        assert len(context.pending) <= 1, "a write was cancelled: write again first"
        assert not sampling.alternatives or self._group.size == 1, "only one rank of a group has the logits"
        done: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._new_calls.append(SampleCall(context, done, sampling, limit, stop, suppress))
        return await self._result(done)

    async def _result(self, done: asyncio.Future[T]) -> T:
        if self._driver is None or self._driver.done():
            self._driver = asyncio.ensure_future(self._drive())
        try:
            return await done
        except asyncio.CancelledError:
            self._cancelled = True
            raise

    async def _drive(self) -> None:
        """Runs passes until no request is left; callers get time for their next one between two passes."""
        try:
            while self._writes or self._new_calls or self._running:
                for _ in range(4):
                    await asyncio.sleep(0)
                self._step()
            self._running = RunningBatch()  # Frees long completions and token sets.
        except BaseException as error:
            requests: list[_Write | SampleCall] = [*self._writes, *self._new_calls, *self._running.calls]
            for request in requests:
                if not request.done.done():
                    request.done.set_exception(error)
            self._writes, self._new_calls, self._running = [], [], RunningBatch()
            if not isinstance(error, Exception):  # Callers already got every other error.
                raise

    def _step(self) -> None:
        """One pass, then a token for each call that has logits to draw from."""
        if self._interrupted:
            raise Interrupted("the engine was interrupted")
        if self._cancelled:
            self._remove_cancelled()
        running, new_calls = self._running, self._new_calls
        running.admit(new_calls)
        self._new_calls = []
        waiting = running.waiting()
        # However much is written, half of a pass is for calls that draw.
        counts = self._counts(self._max_rows - min(len(waiting), self._max_rows // 2))
        decoding = waiting[: self._max_rows - sum(counts)]
        self._synchronize(counts, decoding)
        logits_NV = self._pass(counts, decoding)
        running.advance(decoding)
        self._end_writes(counts, logits_NV)
        held = [call.context for call in new_calls if not call.context.pending]
        logits = [logits_NV[-len(decoding) :]] if len(decoding) else []
        for context in held:
            assert context.logits_V is not None  # `sample` checks it.
            logits.append(context.logits_V[None])
        chosen = np.concatenate([decoding, running.without_token()])
        versions = np.array([self.version] * len(decoding) + [context.version for context in held])
        if len(chosen):
            self._draw(chosen, torch.cat(logits), versions)
        for context in held:
            context.logits_V = None

    def _remove_cancelled(self) -> None:
        self._writes = [write for write in self._writes if not write.done.done()]
        self._new_calls = [call for call in self._new_calls if not call.done.done()]
        self._running.remove_cancelled()
        self._cancelled = False

    def _counts(self, left: int) -> list[int]:
        """How many of each write's tokens go through the next pass, at most `left` in total."""
        counts = []
        for write in self._writes:
            most = left if write.scores is None else min(left, max(1, SCORED_LOGITS // self._config.vocab))
            counts.append(min(len(write.context.pending), most))
            left -= counts[-1]
        return counts

    def _synchronize(self, counts: list[int], decoding: Numbers) -> None:
        """Checks that all ranks do the same, and takes the newest weights that all of them have."""
        with self._offers_lock:
            newest = max(self._offers, default=self.version)
        if self._group.size > 1:
            writes = [
                (write.context.position, write.context.pending[:count])
                for write, count in zip(self._writes, counts, strict=True)
            ]
            columns_N = self._running.columns_N
            work = (writes, columns_N[["position", "token", "limit"]].tolist(), len(decoding))
            newest = self._group.assert_in_step(len(writes) + len(columns_N), work, newest)
        if newest > self.version:
            self._take_offer(newest)

    def _end_writes(self, counts: list[int], logits_NV: torch.Tensor) -> None:
        """Advances the written contexts and answers the writes that are complete."""
        passed = [(write, count) for write, count in zip(self._writes, counts, strict=True) if count]
        begin = 0
        for write, count in passed:
            end = begin + (1 if write.scores is None else count)
            if write.scores is not None:
                write.scores.add(logits_NV[begin:end])
            context, logits_V, begin = write.context, logits_NV[end - 1], end
            del context.pending[:count]
            context.position += count
            if not context.pending:
                # A copy: a view would keep the logits of the whole pass.
                context.logits_V, context.version = logits_V.clone(), self.version
                if not write.done.done():  # else cancelled just now
                    write.done.set_result(None)
        self._writes = [write for write in self._writes if write.context.pending]

    @torch.inference_mode()
    def _draw(self, chosen: Numbers, logits_NV: torch.Tensor, versions: Numbers) -> None:
        """Draws one token for each chosen call; in a group on rank 0, so that rounding cannot split ranks."""
        tokens, logprobs = np.empty(0, np.int64), np.empty(0)
        if self._group.rank == 0:
            columns_N = self._running.columns_N[chosen]
            suppressed = to_device(np.stack(self._running.suppressed(chosen)), logits_NV.device)
            logits_NV[suppressed[0], suppressed[1]] = float("-inf")
            tokens, logprobs = sample_tokens(
                logits_NV,
                uniform_draws(columns_N["seed"], columns_N["position"]),
                columns_N["temperature"],
                columns_N["top_k"],
                columns_N["top_p"],
            )
            listing = np.flatnonzero(columns_N["alternatives"])
            if len(listing):
                temperature = torch.from_numpy(columns_N["temperature"][listing]).to(logits_NV)
                logits = (
                    logits_NV[to_device(listing, logits_NV.device)]
                    / torch.where(temperature == 0, 1.0, temperature)[:, None]
                )
                lists = most_likely(logits, columns_N["alternatives"][listing].tolist())
                for index, alternatives in zip(listing, lists, strict=True):
                    self._running.call(chosen[index]).alternatives.append(alternatives)
        if self._group.size > 1:
            packed = np.stack([tokens.astype(np.float64), logprobs])
            drawn, logprobs = self._group.broadcast(packed, (2, len(chosen)))
            tokens = drawn.astype(np.int64)
        for call, completion in self._running.record(chosen, tokens, logprobs, versions):
            if not call.done.done():  # else cancelled just now
                call.done.set_result(completion)

    def _new_model(self, tensors: Iterable[tuple[str, torch.Tensor]], slots: int) -> DecodeModel:
        return DecodeModel(self._config, tensors, slots, self._group, self._compiled)

    def _drop_model(self) -> None:
        """Frees the old weights and the graphs captured with them before new ones come."""
        self._model = self._graphs = None

    def _take_offer(self, version: int) -> None:
        """Swaps in weights that all ranks have been offered; the cache stays."""
        with self._offers_lock:
            tensors = self._offers[version]
            self._offers = {other: kept for other, kept in self._offers.items() if other > version}
        cached = (self._model.cache_LSX, self._model.chosen_LSC) if self._model else None
        self._drop_model()
        model = self._new_model(tensors, 0)
        if cached is not None:
            model.cache_LSX, model.chosen_LSC = cached
        self._model = model
        self.version = version

    def _pass(self, counts: list[int], decoding: Numbers) -> torch.Tensor:
        """One forward pass over `counts` tokens of the writes and the last token of the `decoding` calls.

        Returns:
            Logits [C, V] after each write that had any token in the pass (after each token of one that is
            scored), then after each call.
        """
        if self._model is None:
            raise RuntimeError("the engine has no weights yet: call load_weights first")
        parts = [(write.context, count) for write, count in zip(self._writes, counts, strict=True) if count]
        columns = self._running.columns_N[decoding]
        counts_C = np.array([count for _, count in parts] + [1] * len(decoding), np.int64)
        if not len(counts_C):
            return torch.empty(0, 0)
        ends_C = np.cumsum(counts_C)
        steps_N = np.arange(ends_C[-1]) - np.repeat(ends_C - counts_C, counts_C)
        rows_C = np.concatenate([np.array([c.row for c, _ in parts], np.int64), columns["row"]])
        starts_C = np.concatenate([np.array([c.position for c, _ in parts], np.int64), columns["position"]])
        written = [token for context, count in parts for token in context.pending[:count]]
        tokens_N = np.concatenate([np.array(written, np.int64), columns["token"]])
        rows_N = np.repeat(rows_C, counts_C)
        positions_N = np.repeat(starts_C, counts_C) + steps_N
        lengths_N = self._table.lengths_C[rows_N] + steps_N + 1
        slots = self._table.slots_with(len(rows_N))
        if slots > len(self._model.cache_LSX[0]):
            self._model.grow(slots)  # Before the table: if memory runs out here, the table is still true.
        slots_N = self._table.extend(rows_N, lengths_N - 1)
        self.computed_tokens += len(tokens_N)
        seen_NT = self._table.slots_CT[rows_N, : lengths_N.max()]
        batch = ForwardBatch(tokens_N, positions_N, slots_N, seen_NT, lengths_N)
        if self._recurring and len(rows_N) == len(rows_C):
            self._graphs = self._graphs or GraphRunner(self._model)
            return self._graphs.logits(batch)
        scored_C = [
            write.scores is not None for write, count in zip(self._writes, counts, strict=True) if count
        ]
        wanted = ends_C - 1
        if any(scored_C):
            ranges = zip(ends_C - counts_C, ends_C, [*scored_C, *[False] * len(decoding)], strict=True)
            wanted = np.concatenate(
                [np.arange(begin if all_ else end - 1, end) for begin, end, all_ in ranges]
            )
        return self._model.logits(batch, wanted)
