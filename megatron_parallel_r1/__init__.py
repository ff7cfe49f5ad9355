"""Trains language models to think in parallel with reinforcement learning, at Megatron scale.
Rooms: thought, model, rollout, rewards, data, train, report; docs/architecture.md walks through them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_parallel_r1.serve.thinker import ParallelThinker

__all__ = ["ParallelThinker"]


def __getattr__(name: str) -> object:
    """Imports `ParallelThinker`, and torch with it, when it is first named."""
    if name == "ParallelThinker":
        from megatron_parallel_r1.serve.thinker import ParallelThinker

        return ParallelThinker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
