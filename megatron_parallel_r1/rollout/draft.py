"""What the thinking loop has written of a chain, and how many tokens it has left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megatron_parallel_r1.rollout.engine import Completion


@dataclass(frozen=True, slots=True)
class TokenBudget:
    """Tokens left for a chain: in the flat text, and on the critical path."""

    flat: int
    critical: int

    @property
    def smallest(self) -> int:
        return min(self.flat, self.critical)

    def minus(self, flat: int, critical: int) -> TokenBudget:
        return TokenBudget(self.flat - flat, self.critical - critical)


@dataclass(slots=True)
class Draft:
    """A chain's flat tokens and their columns.

    Attributes:
        critical: number of tokens on its critical path.
        branches: in mode `replay`, the experts of each path in it that its trace's row repeats, in the order
            of the row (`thought.layout.lay_out`); only if experts are recorded.
    """

    tokens: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    suppressed: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    critical: int = 0
    branches: list[NDArray[np.int16]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)

    def add_forced(self, tokens: Sequence[int], version: int) -> None:
        self.tokens += tokens
        self.sampled += [False] * len(tokens)
        self.suppressed += [False] * len(tokens)
        self.logprobs += [0.0] * len(tokens)
        self.versions += [version] * len(tokens)
        self.critical += len(tokens)

    def add_sampled(self, completion: Completion, suppressed: bool) -> None:
        self.tokens += completion.tokens
        self.sampled += [True] * len(completion.tokens)
        self.suppressed += [suppressed] * len(completion.tokens)
        self.logprobs += completion.logprobs
        self.versions += completion.versions
        self.critical += len(completion.tokens)

    def add_siblings(self, paths: Sequence[Draft]) -> None:
        for path in paths:
            self.tokens += path.tokens
            self.sampled += path.sampled
            self.suppressed += path.suppressed
            self.logprobs += path.logprobs
            self.versions += path.versions
            self.branches += path.branches
        self.critical += max(path.critical for path in paths)
