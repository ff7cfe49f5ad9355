"""The learner's part of one RL step, as in rl/loop.py."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_parallel_r1.distributed.collectives import is_replica_leader, replica_slice
from megatron_parallel_r1.rl.expert_exchange import with_own
from megatron_parallel_r1.rl.learner import Learner
from megatron_parallel_r1.rl.packed_trace import PackedTrace
from megatron_parallel_r1.rl.path_results import PathVerdicts
from megatron_parallel_r1.thought.trace import Trace


def gathered(traces: Sequence[Trace]) -> list[PackedTrace]:
    """Traces as the replicas exchange them: only the one that would have drawn a trace has its experts."""
    packed = [PackedTrace.of(trace) for trace in traces]
    own = replica_slice(packed) if is_replica_leader() else []
    return with_own([trace.without_experts for trace in packed], own)


def learn(
    learner: Learner,
    traces: Sequence[Trace],
    rewards: Sequence[float | None],
    lr: float,
    path_verdicts: Sequence[PathVerdicts] | None = None,
) -> dict[str, float]:
    """Trains on a step's traces and returns its metrics."""
    batch = learner.prepare(gathered(traces))
    return learner.update(batch, learner.advantages(batch, rewards), lr, path_verdicts)
