"""What a rollout server is to the engine and the pool that drive it: one continuation asked, one answered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from megatron_parallel_r1.rollout.base import Completion, Sampling
from megatron_parallel_r1.thought.layout import Mode


@dataclass(frozen=True, slots=True)
class Joined:
    """A closed block inside a token list whose paths did not see one another.

    Attributes:
        fork: index of the first token of the first path.
        ends: index behind the last token of each path, rising; the first path begins at `fork`, each other
            one where the path before it ends.
    """

    fork: int
    ends: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Asked:
    """One continuation.

    Attributes:
        tokens: all that the next token follows, flat.
        sampling, limit, stop, suppress: as in `base.Engine.sample`.
        trace: a name that all continuations of one trace share; they go to one server while it lives.
        joined: closed blocks in `tokens` that are isolated, in order of their forks, those inside a path of
            another one included; only a server that tells of mode `isolated` takes any.
    """

    tokens: tuple[int, ...]
    sampling: Sampling
    limit: int
    stop: frozenset[int]
    suppress: frozenset[int]
    trace: str
    joined: tuple[Joined, ...] = ()


@dataclass(frozen=True, slots=True)
class Answered:
    """What came back.

    Attributes:
        completion: as `base.Engine.sample` gives it.
        cached_tokens: how many of the asked tokens the server had in its cache.
    """

    completion: Completion
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class About:
    """What a server says of itself.

    Attributes:
        model: the folder that it was started with.
        modes: in which its log-probs are exact; `isolated` only if it answered the plugin's handshake.
        version: of its weights, as the last update named it; 0 before any.
        max_tokens: prompt and continuation of one request together.
        cache_tokens: of its key/value cache; None: it does not say.
    """

    model: str
    modes: frozenset[Mode]
    version: int
    max_tokens: int
    cache_tokens: int | None


class Server(Protocol):
    """One server. Every method raises `Unreachable` if there is no (whole) answer in time, and UserError if
    the server refuses what it was asked."""

    @property
    def url(self) -> str:
        """Base address, as `http://host:port`."""
        ...

    async def about(self) -> About: ...

    async def healthy(self) -> bool:
        """Whether it answers at all; never raises."""
        ...

    async def generate(self, asked: Asked) -> Answered: ...

    async def score(self, tokens: tuple[int, ...]) -> tuple[float, ...]:
        """Natural log-probs of tokens[1:] at temperature 1, each given those before it."""
        ...

    async def abort_all(self) -> None:
        """Ends all requests under way; whoever waits for one gets `Unreachable`."""
        ...

    async def close(self) -> None:
        """Gives its connections back."""
        ...


class Unreachable(Exception):
    """A server gave no answer, or broke off; another one may give it."""
