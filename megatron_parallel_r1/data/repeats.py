"""Finds problems that a data set holds several times, in one pass and without keeping their text."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from megatron_parallel_r1.data.problems import Problem


@dataclass(slots=True)
class _Copies:
    first: int
    answers: tuple[str, ...]
    count: int = 1
    agree: bool = True


class Repeats:
    """Problems count as the same if their prompts differ in white space at most."""

    def __init__(self) -> None:
        self._copies: dict[bytes, _Copies] = {}

    def is_new(self, problem: Problem) -> bool:
        """Whether no problem before was the same; the new ones are numbered from 0."""
        words = " ".join(problem.prompt.split())
        # 16 bytes: two of 10^8 different problems collide with a chance below 10^-22.
        key = hashlib.blake2b(words.encode(), digest_size=16).digest()
        copies = self._copies.get(key)
        if copies is None:
            self._copies[key] = _Copies(len(self._copies), problem.answers)
            return True
        copies.count += 1
        copies.agree &= copies.answers == problem.answers
        return False

    def disputed(self) -> frozenset[int]:
        """Numbers of the new problems some copy of which has another answer."""
        return frozenset(copies.first for copies in self._copies.values() if not copies.agree)

    def counts(self) -> tuple[int, int]:
        """Rows that repeat a problem all copies of which agree; rows of problems whose copies do not."""
        repeated = sum(copies.count - 1 for copies in self._copies.values() if copies.agree)
        return repeated, sum(copies.count for copies in self._copies.values() if not copies.agree)
