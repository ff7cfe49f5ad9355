"""The learner's part of one RL step, as in rl/loop.py."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_parallel_r1.rl.learner import Learner
from megatron_parallel_r1.rl.packed_trace import PackedTrace
from megatron_parallel_r1.rl.path_results import PathVerdicts
from megatron_parallel_r1.thought.trace import Trace


def learn(
    learner: Learner,
    traces: Sequence[Trace],
    rewards: Sequence[float | None],
    lr: float,
    path_verdicts: Sequence[PathVerdicts] | None = None,
) -> dict[str, float]:
    """Trains on a step's traces and returns its metrics."""
    batch = learner.prepare([PackedTrace.of(trace) for trace in traces])
    return learner.update(batch, learner.advantages(batch, rewards), lr, path_verdicts)
