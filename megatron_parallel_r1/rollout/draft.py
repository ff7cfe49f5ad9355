"""A trace while it is being written, and the room that it has left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_parallel_r1.rollout.engine import Completion


@dataclass(frozen=True, slots=True)
class Room:
    """Tokens that a chain may still hold: of the flat text, and on the critical path."""

    flat: int
    critical: int

    @property
    def least(self) -> int:
        return min(self.flat, self.critical)

    def without(self, flat: int, critical: int) -> Room:
        return Room(self.flat - flat, self.critical - critical)


@dataclass(slots=True)
class Draft:
    """Flat tokens with what is known of each; `critical` counts those on the critical path."""

    tokens: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    barred: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    critical: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def add_forced(self, tokens: Sequence[int], version: int) -> None:
        self.tokens += tokens
        self.sampled += [False] * len(tokens)
        self.barred += [False] * len(tokens)
        self.logprobs += [0.0] * len(tokens)
        self.versions += [version] * len(tokens)
        self.critical += len(tokens)

    def add_sampled(self, completion: Completion, barred: bool) -> None:
        self.tokens += completion.tokens
        self.sampled += [True] * len(completion.tokens)
        self.barred += [barred] * len(completion.tokens)
        self.logprobs += completion.logprobs
        self.versions += completion.versions
        self.critical += len(completion.tokens)

    def add_siblings(self, paths: Sequence[Draft]) -> None:
        for path in paths:
            self.tokens += path.tokens
            self.sampled += path.sampled
            self.barred += path.barred
            self.logprobs += path.logprobs
            self.versions += path.versions
        self.critical += max(path.critical for path in paths)
