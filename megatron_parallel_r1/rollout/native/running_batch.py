"""All `sample` calls under way, as columns: a pass costs no Python work per token.

Shapes: N calls, M of them, S call slots, B tokens that a slot holds, U distinct token sets, W tokens of the
largest set.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megatron_parallel_r1.rollout.engine import Completion, Sampling
from megatron_parallel_r1.rollout.native.page_table import NativeContext, Numbers

# `slot`: the call's row in the result buffers; `row`, `position`: of its context; `token`: not cached yet (or
# NO_TOKEN); `count`, `limit`: tokens drawn and allowed; `stop`, `suppress`: numbers of token sets.
COLUMNS = np.dtype(
    [
        *((name, np.int64) for name in ("slot", "row", "position", "token", "count", "limit")),
        *((name, np.int64) for name in ("stop", "suppress", "top_k", "alternatives")),
        *((name, np.float64) for name in ("temperature", "top_p")),
        ("seed", np.uint64),
    ]
)
NO_TOKEN = -1


@dataclass(frozen=True, eq=False, slots=True)
class SampleCall:
    """One `sample` call, on a context with one pending token or with logits."""

    context: NativeContext
    done: asyncio.Future[Completion]
    sampling: Sampling
    limit: int
    stop: frozenset[int]
    suppress: frozenset[int]
    alternatives: list[tuple[tuple[int, float], ...]] = field(default_factory=list)


class TokenSets:
    """Numbers sets of token ids; `ids_UW` holds their members, padded with NO_TOKEN."""

    def __init__(self) -> None:
        self._numbers: dict[frozenset[int], int] = {}
        self.ids_UW: Numbers = np.empty((0, 0), np.int64)

    def number(self, tokens: frozenset[int]) -> int:
        if tokens not in self._numbers:
            self._numbers[tokens] = len(self._numbers)
            self.ids_UW = np.full((len(self._numbers), max(map(len, self._numbers))), NO_TOKEN)
            for row, members in zip(self.ids_UW, self._numbers, strict=True):
                row[: len(members)] = sorted(members)
        return self._numbers[tokens]


class RunningBatch:
    """The calls in order of arrival, and what each has drawn so far."""

    def __init__(self) -> None:
        self.columns_N = np.empty(0, COLUMNS)
        self._sets = TokenSets()
        self._calls: dict[int, SampleCall] = {}
        self._free: list[int] = []
        self._tokens_SB = np.empty((0, 16), np.int64)
        self._logprobs_SB = np.empty((0, 16), np.float64)
        self._versions_SB = np.empty((0, 16), np.int64)

    def __len__(self) -> int:
        return len(self.columns_N)

    @property
    def calls(self) -> list[SampleCall]:
        return list(self._calls.values())

    def admit(self, calls: Sequence[SampleCall]) -> None:
        """Appends new calls."""
        rows = []
        for call in calls:
            token = call.context.pending[0] if call.context.pending else NO_TOKEN
            sampling, slot = call.sampling, self._new_slot()
            self._calls[slot] = call
            state = (slot, call.context.row, call.context.position, token, 0, call.limit)
            sets = (self._sets.number(call.stop), self._sets.number(call.suppress))
            counts = (sampling.top_k, sampling.alternatives)
            rows.append((*state, *sets, *counts, sampling.temperature, sampling.top_p, sampling.seed))
        self.columns_N = np.concatenate([self.columns_N, np.array(rows, COLUMNS)])

    def waiting(self) -> Numbers:
        """Calls whose last token must go through the model before they draw the next."""
        return np.flatnonzero(self.columns_N["token"] != NO_TOKEN)

    def without_token(self) -> Numbers:
        """Calls that draw first from the logits of their contexts."""
        return np.flatnonzero(self.columns_N["token"] == NO_TOKEN)

    def suppressed(self, chosen_M: Numbers) -> tuple[Numbers, Numbers]:
        """The pairs (index into `chosen_M`, token) that must not be drawn."""
        ids_MW = self._sets.ids_UW[self.columns_N["suppress"][chosen_M]]
        calls, places = np.nonzero(ids_MW != NO_TOKEN)
        return calls, ids_MW[calls, places]

    def call(self, index: int) -> SampleCall:
        return self._calls[int(self.columns_N["slot"][index])]

    def advance(self, chosen_M: Numbers) -> None:
        """Marks the chosen calls' last tokens as cached."""
        self.columns_N["position"][chosen_M] += 1

    def record(
        self, chosen_M: Numbers, tokens_M: Numbers, logprobs_M: NDArray[np.float64], versions_M: Numbers
    ) -> list[tuple[SampleCall, Completion]]:
        """Stores one token for each chosen call; removes and returns the calls that are now complete."""
        columns_M = self.columns_N[chosen_M]
        slots_M, counts_M = columns_M["slot"], columns_M["count"]
        self._reserve(int(counts_M.max()) + 1)
        self._tokens_SB[slots_M, counts_M] = tokens_M
        self._logprobs_SB[slots_M, counts_M] = logprobs_M
        self._versions_SB[slots_M, counts_M] = versions_M
        stopped_M = (self._sets.ids_UW[columns_M["stop"]] == tokens_M[:, None]).any(1)
        columns_M["token"] = tokens_M
        columns_M["count"] += 1
        self.columns_N[chosen_M] = columns_M
        complete_M = stopped_M | (columns_M["count"] == columns_M["limit"])
        if not complete_M.any():
            return []
        completions = [
            (call := self._release(column), self._completion(column, bool(stopped), call))
            for column, stopped in zip(columns_M[complete_M], stopped_M[complete_M], strict=True)
        ]
        self._remove(chosen_M[complete_M])
        return completions

    def remove_cancelled(self) -> None:
        """Removes calls that nobody waits for any more."""
        slots = [slot for slot, call in self._calls.items() if call.done.done()]
        cancelled = np.flatnonzero(np.isin(self.columns_N["slot"], slots))
        for column in self.columns_N[cancelled]:
            self._release(column)
        self._remove(cancelled)

    def _remove(self, indices: Numbers) -> None:
        self.columns_N = np.delete(self.columns_N, indices)

    def _release(self, column: np.void) -> SampleCall:
        """Frees a call's slot and writes its state back to its context."""
        slot = int(column["slot"])
        call = self._calls.pop(slot)
        self._free.append(slot)
        call.context.position = int(column["position"])
        call.context.pending = [] if column["token"] == NO_TOKEN else [int(column["token"])]
        return call

    def _completion(self, column: np.void, stopped: bool, call: SampleCall) -> Completion:
        slot, count = column["slot"], column["count"]
        return Completion(
            tuple(self._tokens_SB[slot, :count].tolist()),
            tuple(self._logprobs_SB[slot, :count].tolist()),
            tuple(self._versions_SB[slot, :count].tolist()),
            stopped,
            tuple(call.alternatives),
        )

    def _new_slot(self) -> int:
        if not self._free:
            slots = len(self._tokens_SB)
            self._free = list(range(max(64, 2 * slots) - 1, slots - 1, -1))
            self._pad(rows=len(self._free), columns=0)
        return self._free.pop()

    def _reserve(self, tokens: int) -> None:
        while tokens > self._tokens_SB.shape[1]:
            self._pad(rows=0, columns=self._tokens_SB.shape[1])

    def _pad(self, rows: int, columns: int) -> None:
        widths = ((0, rows), (0, columns))
        self._tokens_SB = np.pad(self._tokens_SB, widths)
        self._logprobs_SB = np.pad(self._logprobs_SB, widths)
        self._versions_SB = np.pad(self._versions_SB, widths)
