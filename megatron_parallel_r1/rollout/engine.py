"""The engine interface that the parallel-thinking loop uses.

A context is an engine's handle on a written prefix: everything that the next token sees. The loop writes
forced tokens to it, samples until a stop token, forks it and joins its forks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_parallel_r1.thought.layout import Mode

Context = TypeVar("Context")


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters. Temperature 0 is greedy; top_k 0 and top_p 1 keep all tokens.

    `seed` fixes the draw at each position, whatever else is in the batch. `alternatives`: how many of the
    most likely tokens each `TokenScore` lists; above 0 only for an engine that `ScoresTokens`.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    alternatives: int = 0


@dataclass(frozen=True, slots=True)
class TokenScore:
    """The natural log-prob of a token, and the most likely tokens in its place with theirs, best first."""

    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """The result of one `sample` call.

    Attributes:
        tokens: at least one; a stop token, if drawn, is the last.
        logprobs: natural log-probability of each token under softmax(logits / temperature) over all tokens
            except suppressed ones, before top-k and top-p (temperature 0 counts as 1).
        versions: of the weights that drew each token.
        stopped: the last token is a stop token; otherwise the limit was reached.
        alternatives: of each token, if any were requested; see `TokenScore`.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    versions: tuple[int, ...]
    stopped: bool
    alternatives: tuple[tuple[tuple[int, float], ...], ...] = ()

    @property
    def scores(self) -> tuple[TokenScore, ...]:
        alternatives = self.alternatives or ((),) * len(self.tokens)
        return tuple(map(TokenScore, self.logprobs, alternatives))


class Interrupted(Exception):
    """The engine was interrupted (`Engine.interrupt`)."""


@runtime_checkable
class RecordsExperts(Protocol):
    """An engine that remembers which experts it chose.

    Shapes: T tokens, Z choices of a token: those of its first layer, then those of the next one.
    """

    async def experts_of(self, context: Any, count: int) -> NDArray[np.int16]:
        """The experts [T, Z] of the last `count` tokens of a context; the very last one may be missing."""


@runtime_checkable
class ScoresTokens(Protocol):
    """An engine that scores given tokens, and lists alternatives to those that it draws."""

    async def score(self, context: Any, tokens: Sequence[int], alternatives: int) -> list[TokenScore]:
        """Writes tokens to an empty context; scores of `tokens[1:]` at temperature 1."""


class Engine(Protocol, Generic[Context]):
    """Draws tokens. Call it once at a time per context; many contexts run at once."""

    @property
    def modes(self) -> frozenset[Mode]:
        """Modes in which its log-probs are exact."""

    @property
    def version(self) -> int:
        """Of the weights that it holds."""

    @property
    def runs_on_all_ranks(self) -> bool:
        """Whether all ranks of a model replica make each call; otherwise only its first rank does."""

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Loads weights under their Hugging Face names; no context may be open."""

    def offer_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Offers weights to load between two passes, even with open contexts; any thread may call it.

        The KV cache of open contexts stays as the old weights computed it, as in inference servers that
        update without a flush. Later tokens come from a mixture that no single version would give: the
        mismatch metrics show it, truncated importance sampling bounds it. A token's version is that of the
        pass that computed its distribution.

        Args:
            tensors: must not change any more.
        """

    def interrupt(self) -> None:
        """Ends calls under way, and all later ones, with `Interrupted`; any thread may call it."""

    def open(self) -> Context:
        """An empty context."""

    async def write(self, context: Context, tokens: Sequence[int]) -> None:
        """Appends forced tokens. Afterwards the whole context is in the cache, ready to fork or join."""

    async def sample(
        self,
        context: Context,
        sampling: Sampling,
        limit: int,
        stop: frozenset[int],
        suppress: frozenset[int],
    ) -> Completion:
        """Draws tokens up to one of `stop`, at most `limit`, and never one of `suppress`.

        The last token may not be in the cache yet; `write(context, ())` puts it there.
        """

    def fork(self, context: Context) -> Context:
        """A second context that shares the same prefix, which must be written."""

    def join(self, trunk: Context, paths: Sequence[Context]) -> Context:
        """The context after isolated paths: it sees the trunk and all paths as they were written, and
        continues after the highest position. The paths are written forks of `trunk`, unchanged since."""

    def close(self, context: Context) -> None:
        """Closes the context and frees what no other context shares."""
