"""What the parallel-thinking loop asks of an engine.

A context is what the next token sees: an engine's own handle on a written prefix. The loop speaks of
contexts in the words of the method: write forced tokens, sample until a stop token, fork, join.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

from megatron_parallel_r1.thought.layout import Mode

Context = TypeVar("Context")


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is drawn. temperature 0 takes the likeliest; top_k 0 and top_p 1 keep all.

    `seed` fixes the draw at each position, whatever else is in the batch.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """What one `sample` call drew.

    Attributes:
        tokens: at least one; a stop token, if met, is the last.
        logprobs: natural log-probability of each under softmax(logits / temperature) over all tokens but
            the suppressed ones, before top-k and top-p (temperature 0 counts as 1).
        versions: of the weights that drew each.
        stopped: the last token is a stop token; else the limit was reached.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    versions: tuple[int, ...]
    stopped: bool


class Interrupted(Exception):
    """What an engine was asked for will not come: somebody called `interrupt`."""


class Engine(Protocol, Generic[Context]):
    """Draws tokens. Calls on one context come one at a time; many contexts run at once."""

    @property
    def modes(self) -> frozenset[Mode]:
        """Modes in which its log-probs are exact."""
        ...

    @property
    def version(self) -> int:
        """Of the weights it holds."""
        ...

    @property
    def runs_on_all_ranks(self) -> bool:
        """Whether all processes of a copy of the model make each call together; else its first one alone."""
        ...

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Takes new weights under their Hugging Face names; no context may be open."""
        ...

    def offer_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Has new weights taken between two passes, contexts open or not; any thread may call it.

        What the open contexts have in the cache stays as the old weights made it, as in inference servers
        that update without a flush. What is drawn after that comes from a mixture that no single version
        would give: the mismatch metrics show it, truncated importance sampling bounds it. A token's version
        is that of the pass that made its distribution.

        Args:
            tensors: not to be changed any more by the caller.
        """
        ...

    def interrupt(self) -> None:
        """Ends what is under way or asked later with `Interrupted`; any thread may call it."""
        ...

    def open(self) -> Context:
        """An empty context."""
        ...

    async def write(self, context: Context, tokens: Sequence[int]) -> None:
        """Appends forced tokens. Afterwards all of the context is in the cache, ready to fork or join."""
        ...

    async def sample(
        self,
        context: Context,
        sampling: Sampling,
        limit: int,
        stop: frozenset[int],
        suppress: frozenset[int],
    ) -> Completion:
        """Draws tokens until one of `stop` or `limit` of them; never one of `suppress`.

        The last token may not be in the cache yet; `write(context, ())` brings it there.
        """
        ...

    def fork(self, context: Context) -> Context:
        """A second context with the same past, which it shares. The past must be written."""
        ...

    def join(self, trunk: Context, paths: Sequence[Context]) -> Context:
        """What follows isolated paths: sees trunk and all paths as they were written, and goes on behind
        the furthest position. The paths are written forks of `trunk`, which was not extended since."""
        ...

    def close(self, context: Context) -> None:
        """Lets go of the context; what no other context shares is freed."""
        ...


class EngineWrapper(Generic[Context]):
    """The half of an `Engine` that is alike in all wrappers; contexts are theirs to handle."""

    def __init__(self, engine: Engine[Context]) -> None:
        self._engine = engine

    @property
    def modes(self) -> frozenset[Mode]:
        return self._engine.modes

    @property
    def version(self) -> int:
        return self._engine.version

    @property
    def runs_on_all_ranks(self) -> bool:
        return self._engine.runs_on_all_ranks

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        self._engine.load_weights(tensors, version)

    def offer_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        self._engine.offer_weights(tensors, version)

    def interrupt(self) -> None:
        self._engine.interrupt()
