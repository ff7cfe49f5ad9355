"""Whether an answer is the reference: text, then exact numbers, then algebra in a worker process."""

from __future__ import annotations

import os
from functools import lru_cache

from megatron_parallel_r1.rewards.fast_equality import settle
from megatron_parallel_r1.rewards.verifier import Verifier


def equivalent(answer: str | None, reference: str) -> bool:
    """Whether `answer` is `reference`, through a verifier of this process; safe on any text.

    A training loop that checks thousands keeps a `Verifier` of its own and calls `check_many`.
    """
    verdict = settle(answer, reference)
    if verdict is None:
        verdict = _own_verifier(os.getpid()).check(answer or "", reference)
    return verdict.correct


@lru_cache(maxsize=1)
def _own_verifier(pid: int) -> Verifier:
    """Keyed by process, so that a forked child starts a worker of its own."""
    return Verifier()
