"""All `sample` calls under way, as columns: a pass costs no Python work for each token.

Shapes: N calls, M of them, S places for what calls drew, B tokens that a place holds, U distinct sets of
tokens, W tokens of the largest set.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_parallel_r1.rollout.engine import Completion, Sampling
from megatron_parallel_r1.rollout.native.forward_batch import NativeContext, Numbers

# A call's place among what was drawn, its context's row and next position, the token that is not in the cache
# yet (or NO_TOKEN), how many it drew and may draw, how, and which sets of tokens end it or may not come.
COLUMNS = np.dtype(
    [
        *((name, np.int64) for name in ("place", "row", "position", "token", "count", "limit")),
        *((name, np.int64) for name in ("stop", "suppress", "top_k")),
        *((name, np.float64) for name in ("temperature", "top_p")),
        ("seed", np.uint64),
    ]
)
NO_TOKEN = -1


@dataclass(frozen=True, eq=False, slots=True)
class SampleCall:
    """One `sample`, of a context with one token pending or with logits."""

    context: NativeContext
    done: asyncio.Future[Completion]
    sampling: Sampling
    limit: int
    stop: frozenset[int]
    suppress: frozenset[int]


class TokenSets:
    """Sets of token ids by number; `ids_UW` has their members, filled up with NO_TOKEN."""

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
        """Puts new calls behind the others."""
        fresh = []
        for call in calls:
            token = call.context.pending[0] if call.context.pending else NO_TOKEN
            sampling, place = call.sampling, self._place()
            self._calls[place] = call
            where = (place, call.context.row, call.context.position, token, 0, call.limit)
            sets = (self._sets.number(call.stop), self._sets.number(call.suppress))
            how = (sampling.top_k, sampling.temperature, sampling.top_p, sampling.seed)
            fresh.append((*where, *sets, *how))
        self.columns_N = np.concatenate([self.columns_N, np.array(fresh, COLUMNS)])

    def waiting(self) -> Numbers:
        """Calls whose last token must go through the model before they draw on."""
        return np.flatnonzero(self.columns_N["token"] != NO_TOKEN)

    def without_token(self) -> Numbers:
        """Calls that draw first from the logits that their contexts bring."""
        return np.flatnonzero(self.columns_N["token"] == NO_TOKEN)

    def suppressed(self, chosen_M: Numbers) -> tuple[Numbers, Numbers]:
        """Which (call of the chosen, token) may not be drawn."""
        ids_MW = self._sets.ids_UW[self.columns_N["suppress"][chosen_M]]
        calls, places = np.nonzero(ids_MW != NO_TOKEN)
        return calls, ids_MW[calls, places]

    def advance(self, chosen_M: Numbers) -> None:
        """The chosen's last tokens are in the cache."""
        self.columns_N["position"][chosen_M] += 1

    def record(
        self, chosen_M: Numbers, tokens_M: Numbers, logprobs_M: NDArray[np.float64], versions_M: Numbers
    ) -> list[tuple[SampleCall, Completion]]:
        """Keeps one token for each of the chosen; the calls that are complete now, which leave."""
        columns_M = self.columns_N[chosen_M]
        places_M, counts_M = columns_M["place"], columns_M["count"]
        self._reach(int(counts_M.max()) + 1)
        self._tokens_SB[places_M, counts_M] = tokens_M
        self._logprobs_SB[places_M, counts_M] = logprobs_M
        self._versions_SB[places_M, counts_M] = versions_M
        stopped_M = (self._sets.ids_UW[columns_M["stop"]] == tokens_M[:, None]).any(1)
        columns_M["token"] = tokens_M
        columns_M["count"] += 1
        self.columns_N[chosen_M] = columns_M
        complete_M = stopped_M | (columns_M["count"] == columns_M["limit"])
        if not complete_M.any():
            return []
        told = [
            (self._leave(column), self._completion(column, bool(stopped)))
            for column, stopped in zip(columns_M[complete_M], stopped_M[complete_M], strict=True)
        ]
        self._keep_all_but(chosen_M[complete_M])
        return told

    def forget_cancelled(self) -> None:
        """Drops calls that nobody waits for any more."""
        gone = [place for place, call in self._calls.items() if call.done.done()]
        gone_N = np.flatnonzero(np.isin(self.columns_N["place"], gone))
        for column in self.columns_N[gone_N]:
            self._leave(column)
        self._keep_all_but(gone_N)

    def _keep_all_but(self, gone: Numbers) -> None:
        self.columns_N = np.delete(self.columns_N, gone)

    def _leave(self, column: np.void) -> SampleCall:
        """The call, whose context gets back what its columns say."""
        place = int(column["place"])
        call = self._calls.pop(place)
        self._free.append(place)
        call.context.position = int(column["position"])
        call.context.pending = [] if column["token"] == NO_TOKEN else [int(column["token"])]
        return call

    def _completion(self, column: np.void, stopped: bool) -> Completion:
        place, count = column["place"], column["count"]
        drawn = (self._tokens_SB, self._logprobs_SB, self._versions_SB)
        return Completion(*(tuple(kept_SB[place, :count].tolist()) for kept_SB in drawn), stopped)

    def _place(self) -> int:
        if not self._free:
            places = len(self._tokens_SB)
            self._free = list(range(max(64, 2 * places) - 1, places - 1, -1))
            self._pad(rows=len(self._free), columns=0)
        return self._free.pop()

    def _reach(self, tokens: int) -> None:
        while tokens > self._tokens_SB.shape[1]:
            self._pad(rows=0, columns=self._tokens_SB.shape[1])

    def _pad(self, rows: int, columns: int) -> None:
        more = ((0, rows), (0, columns))
        self._tokens_SB = np.pad(self._tokens_SB, more)
        self._logprobs_SB = np.pad(self._logprobs_SB, more)
        self._versions_SB = np.pad(self._versions_SB, more)
