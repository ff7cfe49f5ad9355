"""The native engine: collects what all contexts ask for, and serves it one batched pass at a time.

Under tensor parallelism each process runs an engine and asks it for the same, in the same order. What is
served when depends on the requests alone, so the engines stay in step; what is drawn, rank 0 says.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.rollout.engine import Completion, Interrupted, Sampling
from megatron_parallel_r1.rollout.native.forward_batch import ForwardBatch, NativeContext, Numbers
from megatron_parallel_r1.rollout.native.graphs import GraphRunner
from megatron_parallel_r1.rollout.native.model import DecodeModel, local_config
from megatron_parallel_r1.rollout.native.page_table import PageTable
from megatron_parallel_r1.rollout.native.running_batch import RunningBatch, SampleCall
from megatron_parallel_r1.rollout.native.sampler import sample_tokens, uniform_draws
from megatron_parallel_r1.rollout.native.tensor_parallel import TensorParallelGroup
from megatron_parallel_r1.thought.layout import Mode

Answer = TypeVar("Answer")


@dataclass(frozen=True, eq=False, slots=True)
class _Write:
    """One `write` under way."""

    context: NativeContext
    done: asyncio.Future[None]


class NativeEngine:
    """Exact in every mode. `computed_tokens` counts the rows that went through the model.

    Args:
        config: of the model whose weights `load_weights` will bring.
        team: the processes that share the engine's weights; None for this process alone.
        max_rows: tokens in one pass at most; longer prompts take several.
        recurring: decode on shapes that recur, which CUDA graphs replay (graphs.py); None: where there is
            CUDA. Never for a team or a model with experts.
        compiled: the model's layers go through torch.compile, which takes up to a minute at the first passes
            and, on a CPU, a C++ compiler.

    Raises:
        UserError: the team's size does not divide the model's heads.
    """

    modes: frozenset[Mode] = frozenset({"isolated", "replay", "causal", "sequential"})
    runs_on_all_ranks = True

    def __init__(
        self,
        config: ModelConfig,
        team: TensorParallelGroup | None = None,
        max_rows: int = 1024,
        recurring: bool | None = None,
        compiled: bool = False,
    ) -> None:
        self.version = -1
        self.computed_tokens = 0
        self._team = team or TensorParallelGroup.alone()
        local_config(config, self._team.size)
        self._config = config
        self._max_rows = max_rows
        self._compiled = compiled
        recurring = torch.cuda.is_available() if recurring is None else recurring
        self._recurring = recurring and self._team.size == 1 and not config.experts
        self._decoder: GraphRunner | None = None
        self._table = PageTable()
        self._model: DecodeModel | None = None
        self._writes: list[_Write] = []
        self._calls: list[SampleCall] = []
        self._draws = RunningBatch()
        self._cancelled = False
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
        self._model = self._new_model(tensors, self._table.slot_count)
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
            written = _Write(context, asyncio.get_running_loop().create_future())
            self._writes.append(written)
            await self._served(written.done)

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
        assert len(context.pending) <= 1, "a write was broken off: write again first"
        done: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._calls.append(SampleCall(context, done, sampling, limit, stop, suppress))
        return await self._served(done)

    async def _served(self, done: asyncio.Future[Answer]) -> Answer:
        if self._driver is None or self._driver.done():
            self._driver = asyncio.ensure_future(self._drive())
        try:
            return await done
        except asyncio.CancelledError:
            self._cancelled = True
            raise

    async def _drive(self) -> None:
        """Passes until nobody asks. Between two, whoever was answered gets the time to ask again."""
        try:
            while self._writes or self._calls or self._draws:
                for _ in range(4):
                    await asyncio.sleep(0)
                self._step()
            self._draws = RunningBatch()  # Frees long completions and token sets.
        except BaseException as error:
            for asked in (*self._writes, *self._calls, *self._draws.calls):
                if not asked.done.done():
                    asked.done.set_exception(error)
            self._writes, self._calls, self._draws = [], [], RunningBatch()
            if not isinstance(error, Exception):  # Of others, whoever asked was told.
                raise

    def _step(self) -> None:
        """One pass, then a token for each call that has logits to draw from."""
        if self._interrupted:
            raise Interrupted("the engine was told to end")
        if self._cancelled:
            self._forget_cancelled()
        draws, newcomers = self._draws, self._calls
        draws.admit(newcomers)
        self._calls = []
        waiting = draws.waiting()
        # However many write, half of a pass is for those who draw.
        counts = self._counts(self._max_rows - min(len(waiting), self._max_rows // 2))
        behind = waiting[: self._max_rows - sum(counts)]
        self._meet(counts, behind)
        logits_NV = self._pass(counts, behind)
        draws.advance(behind)
        self._end_writes(counts, logits_NV)
        held = [call.context for call in newcomers if not call.context.pending]
        logits = [logits_NV[-len(behind) :]] if len(behind) else []
        logits += [context.logits_V[None] for context in held]
        chosen = np.concatenate([behind, draws.without_token()])
        versions = np.array([self.version] * len(behind) + [one.version for one in held])
        if len(chosen):
            self._draw(chosen, torch.cat(logits), versions)
        for context in held:
            context.logits_V = None

    def _forget_cancelled(self) -> None:
        self._writes = [write for write in self._writes if not write.done.done()]
        self._calls = [call for call in self._calls if not call.done.done()]
        self._draws.forget_cancelled()
        self._cancelled = False

    def _counts(self, left: int) -> list[int]:
        """How many of each write's tokens go through the next pass, `left` in all at most."""
        counts = []
        for write in self._writes:
            counts.append(min(len(write.context.pending), left))
            left -= counts[-1]
        return counts

    def _meet(self, counts: list[int], behind: Numbers) -> None:
        """All ranks of a team are about to do the same, with the newest weights that all of them have."""
        with self._offering:
            newest = max(self._offers, default=self.version)
        if self._team.size > 1:
            writes = [
                (write.context.position, write.context.pending[:count])
                for write, count in zip(self._writes, counts, strict=True)
            ]
            columns_N = self._draws.columns_N
            work = (writes, columns_N[["position", "token", "limit"]].tolist(), len(behind))
            newest = self._team.agree(len(writes) + len(columns_N), work, newest)
        if newest > self.version:
            self._take_offer(newest)

    def _end_writes(self, counts: list[int], logits_NV: torch.Tensor) -> None:
        """Moves the written contexts on; whoever asked for one that is complete is told."""
        passed = [(write, count) for write, count in zip(self._writes, counts, strict=True) if count]
        for (write, count), logits_V in zip(passed, logits_NV[: len(passed)], strict=True):
            context = write.context
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
        """One token for each; of a team rank 0 draws, so that rounding cannot make the ranks part ways."""
        tokens, logprobs = np.empty(0, np.int64), np.empty(0)
        if self._team.rank == 0:
            columns_N = self._draws.columns_N[chosen]
            rows, suppressed = map(torch.from_numpy, self._draws.suppressed(chosen))
            logits_NV[rows.to(logits_NV.device), suppressed.to(logits_NV.device)] = float("-inf")
            tokens, logprobs = sample_tokens(
                logits_NV,
                uniform_draws(columns_N["seed"], columns_N["position"]),
                columns_N["temperature"],
                columns_N["top_k"],
                columns_N["top_p"],
            )
        if self._team.size > 1:
            told_XN = np.stack([tokens.astype(np.float64), logprobs])
            drawn, logprobs = self._team.broadcast(told_XN, (2, len(chosen)))
            tokens = drawn.astype(np.int64)
        for call, completion in self._draws.record(chosen, tokens, logprobs, versions):
            if not call.done.done():  # else cancelled just now
                call.done.set_result(completion)

    def _new_model(self, tensors: Iterable[tuple[str, torch.Tensor]], slots: int) -> DecodeModel:
        return DecodeModel(self._config, tensors, slots, self._team, self._compiled)

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
        self._model = self._new_model(tensors, 0)
        self._model.cache_LSX = cache_LSX or self._model.cache_LSX
        self.version = version

    def _pass(self, counts: list[int], behind: Numbers) -> torch.Tensor:
        """One forward pass over so many tokens of each write, and the last token of the calls `behind`.

        Returns:
            Logits [C, V] behind each write that had any token in the pass, then behind each call.
        """
        if self._model is None:
            raise RuntimeError("the engine has no weights yet: call load_weights first")
        parts = [(write.context, count) for write, count in zip(self._writes, counts, strict=True) if count]
        columns = self._draws.columns_N[behind]
        counts_C = np.array([count for _, count in parts] + [1] * len(behind), np.int64)
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
            self._model.grow(slots)  # Before the table: if memory ends here, it still says what there is.
        slots_N = self._table.extend(rows_N, lengths_N - 1)
        self.computed_tokens += len(tokens_N)
        seen_NT = self._table.slots_CT[rows_N, : lengths_N.max()]
        asked = ForwardBatch(tokens_N, positions_N, slots_N, seen_NT, lengths_N)
        if self._recurring and len(rows_N) == len(rows_C):
            self._decoder = self._decoder or GraphRunner(self._model)
            return self._decoder.logits(asked)
        return self._model.pass_of(asked, ends_C - 1)
