"""What a rollout server is to the engine and the pool that drive it: one continuation asked, one answered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from megatron_parallel_r1.rollout.base import Completion, Sampling
from megatron_parallel_r1.rollout.joined import Joined
from megatron_parallel_r1.thought.layout import Mode

__all__ = [
    "STARTED",
    "STOCK_MODES",
    "About",
    "Answered",
    "Asked",
    "Joined",
    "Server",
    "Timeouts",
    "Unreachable",
]

STARTED = -1
"""Version of the weights that a server was started with, which no update has named. Not 0: that is the first
one of a stage, and a server that comes back with other weights must not be taken for it."""

STOCK_MODES: frozenset[Mode] = frozenset({"replay", "causal", "sequential"})
"""Modes that any server serves exactly that continues a token list and can bar a token."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long a server is waited for, in seconds.

    Attributes:
        connect_s: until a connection stands.
        answer_s: until a continuation or a score is there.
        check_s: until it says of itself.
    """

    connect_s: float = 10.0
    answer_s: float = 1800.0
    check_s: float = 20.0


@dataclass(frozen=True, slots=True)
class Asked:
    """One continuation.

    Attributes:
        tokens: all that the next token follows, flat; at least one.
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
        cached_tokens: how many of the asked tokens the server had in its cache; 0 where it does not say.
    """

    completion: Completion
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class About:
    """What a server says of itself.

    Attributes:
        model: the folder that it was started with.
        modes: in which its log-probs are exact; `isolated` only if it answered the plugin's handshake.
        version: of its weights, as the last update named it; `STARTED` before any.
        max_tokens: prompt and continuation of one request together.
        cache_tokens: of its key/value cache; None: it does not say.
        seeded: a draw is fixed by its seed: asked for the same twice, it drew the same.
        copies: of the model in an SGLang server, data-parallel ones.
    """

    model: str
    modes: frozenset[Mode]
    version: int
    max_tokens: int
    cache_tokens: int | None
    seeded: bool = True
    copies: int = 1


class Server(Protocol):
    """One server. Every method raises `Unreachable` if there is no (whole) answer in time, and UserError if
    the server refuses what it was asked. A server may be used in one event loop after another."""

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
        """Gives its connections back; the end of the event loop does it too."""
        ...


class Unreachable(Exception):
    """A server gave no answer, or broke off; another one may give it."""


def version_of(name: object) -> int:
    """The number of a server's weight version; `STARTED` where no update has named one yet ("default")."""
    return int(name) if isinstance(name, (int, str)) and str(name).isdigit() else STARTED


def told_version(version: int | None) -> str:
    """For messages."""
    return "as it was started" if version == STARTED else str(version)


def versions_of(spans: object, count: int, otherwise: int) -> tuple[int, ...]:
    """Of each of `count` drawn tokens, the weights that drew it.

    Args:
        spans: as both engines send them: `{version, start, end}` in order; None where they do not say.
        otherwise: for tokens that no span covers.
    """
    versions = [otherwise] * count
    for span in spans if isinstance(spans, list) else []:
        start, end = int(span["start"]), min(int(span["end"]), count)
        versions[start:end] = [version_of(span["version"])] * max(0, end - start)
    return tuple(versions)
