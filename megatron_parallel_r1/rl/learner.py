"""From traces and their rewards to optimizer steps.

    traces -> rows -> (old and reference log-probs) -> rewards -> advantages -> weights -> updates

Every sampled token is trained under the layout of the mode that it was rolled out in, so that the engine's
log-probs and the trainer's are the same numbers; how far they are apart is measured at every step.

Departs from the paper: the ratio's denominator is the trainer's own log-prob at the start of the step. A step
with one update has just that log-prob at hand and needs no pass of its own for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_parallel_r1.distributed.collectives import all_reduce_max, sum_metrics
from megatron_parallel_r1.rl.objective.advantage import ADVANTAGES, Float64
from megatron_parallel_r1.rl.objective.aggregation import target_weights
from megatron_parallel_r1.rl.objective.correction import effective_share
from megatron_parallel_r1.rl.objective.credit import path_advantages
from megatron_parallel_r1.rl.objective.kl import kl_penalties
from megatron_parallel_r1.rl.objective.loss import policy_loss
from megatron_parallel_r1.rl.objective.mismatch import Mismatch, largest_apart, mismatch_sums
from megatron_parallel_r1.rl.objective.overlong import complete, overlong_penalties
from megatron_parallel_r1.rl.objective.settings import Objective
from megatron_parallel_r1.rl.reference import Reference
from megatron_parallel_r1.thought.layout import Mode, lay_out
from megatron_parallel_r1.thought.tags import Tags
from megatron_parallel_r1.thought.trace import Trace
from megatron_parallel_r1.train.micro_batch import MicroBatch
from megatron_parallel_r1.train.partition import share_out
from megatron_parallel_r1.train.trainer import Trainer, Update
from megatron_parallel_r1.utils.timers import Phases

# Of each block of a trace and each of its paths, whether its own answer is right; None where it has none.
PathVerdicts = Sequence[Sequence[bool | None]]


@dataclass(frozen=True, slots=True)
class Schooling:
    """How often and in what portions a step's traces are learned from.

    Attributes:
        samples: traces of a group.
        epochs, mini_batches: the traces are gone through `epochs` times, in `mini_batches` updates each.
        micro_tokens: capacity of a packed row.
        limit: tokens of the longest response, for an over-long penalty.
    """

    samples: int
    epochs: int
    mini_batches: int
    micro_tokens: int
    limit: int


@dataclass(frozen=True, slots=True)
class Learner:
    """What learning needs beside the traces.

    Attributes:
        reference: where the objective has a KL term.
        phases: takes down what `logprobs` (old ones and the reference's) and `update` cost.
    """

    trainer: Trainer
    objective: Objective
    schooling: Schooling
    mode: Mode
    tags: Tags
    reference: Reference | None = None
    phases: Phases = field(default_factory=Phases)

    def learn(
        self,
        traces: Sequence[Trace],
        rewards: Sequence[float],
        lr: float,
        path_verdicts: Sequence[PathVerdicts] | None = None,
    ) -> dict[str, float]:
        """Makes all updates of a step.

        Args:
            traces: whole groups in turn, the same on every process.
            path_verdicts: of each trace, for per-path credit.

        Returns:
            Metrics of the step.

        Raises:
            NotFinite: loss or gradient of an update is not; that one and those after it were not made.
        """
        portions, batches = self._portions(traces)
        everything = [batch for portion in batches for batch in portion]
        with self.phases.of("logprobs"):
            self._score(batches)
        penalties = self._penalties(traces, everything)
        totals_T = np.asarray(rewards) + sum(penalties.values())
        totals_PG = totals_T.reshape(-1, self.schooling.samples)
        advantages_T = ADVANTAGES[self.objective.advantage](totals_PG).ravel()
        self._spread(traces, advantages_T, path_verdicts, portions, batches)

        def loss(
            logprobs_N: torch.Tensor, entropies_N: torch.Tensor, batch: MicroBatch
        ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            return policy_loss(logprobs_N, entropies_N, batch.values, self.objective, batch.members)

        with self.phases.of("update"):
            updates = [
                self.trainer.update(portion, loss, lr)
                for _ in range(self.schooling.epochs)
                for portion in batches
            ]
        old = [batch.values["old"] for batch in everything if "old" in batch.values] or updates[0].logprobs
        penalized = {name: float(penalties_T.mean()) for name, penalties_T in penalties.items()}
        return self._metrics(updates) | penalized | self._mismatch(old, everything)

    def _portions(self, traces: Sequence[Trace]) -> tuple[list[np.ndarray], list[list[MicroBatch]]]:
        """Which traces each mini-batch has, and this process's micro-batches of it.

        Groups stay whole, so that each mini-batch has advantages that balance.
        """
        rows = [lay_out(t.prompt, t.tokens, t.sampled, t.tree, self.mode) for t in traces]
        groups = np.arange(len(traces)).reshape(-1, self.schooling.samples)
        count = min(self.schooling.mini_batches, len(groups))
        portions = [part.ravel() for part in np.array_split(groups, count)]
        engine, barred = {"engine": [t.logprobs for t in traces]}, [t.barred for t in traces]
        device, place = self.trainer.device, self.trainer.place
        return portions, [
            [
                MicroBatch.of(row, device, engine, barred, self.tags.parallel)
                for row in share_out(rows, self.schooling.micro_tokens, place, portion.tolist())
            ]
            for portion in portions
        ]

    def _score(self, batches: Sequence[Sequence[MicroBatch]]) -> None:
        """Gives the micro-batches the log-probs of before the step, and the reference's, where needed."""
        alone = self.schooling.epochs * len(batches) == 1
        if not alone or self.objective.kl_in == "reward":
            for portion in batches:
                # Only the last pipeline stage has them, and only it needs them.
                for batch, old_N in zip(portion, self.trainer.logprobs(portion), strict=False):
                    batch.values["old"] = old_N
        if self.reference is not None:
            for portion in batches:
                self.reference.score(portion)

    def _penalties(self, traces: Sequence[Trace], batches: Sequence[MicroBatch]) -> dict[str, Float64]:
        """What is added to each trace's reward, under the names that the means have as metrics."""
        objective = self.objective
        penalties: dict[str, Float64] = {}
        if objective.overlong_cache:
            lengths_T = np.array([len(trace.tokens) for trace in traces])
            penalties["penalty_overlong"] = overlong_penalties(
                lengths_T, self.schooling.limit, objective.overlong_cache, objective.overlong_penalty
            )
        if objective.kl != "none" and objective.kl_in == "reward":
            penalties["penalty_kl"] = self._kl_penalties(len(traces), batches)
        return penalties

    def _kl_penalties(self, count: int, batches: Sequence[MicroBatch]) -> Float64:
        """Of all traces, on every process, from what each last pipeline stage has of them."""
        sums_T = torch.zeros(count, dtype=torch.float64, device=self.trainer.device)
        for batch in batches:
            if "reference" in batch.values:
                sums_T[list(batch.row.members)] = kl_penalties(
                    batch.values["old"],
                    batch.values["reference"],
                    self.objective.kl,
                    self.objective.kl_coefficient,
                    batch.members,
                )
        # Ranks of a tensor or context group have the same totals; one of them is to count.
        others = (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_context_parallel_rank(),
        )
        if any(others):
            sums_T.zero_()
        if dist.get_world_size() > 1:
            dist.all_reduce(sums_T)
        return sums_T.cpu().numpy()

    def _spread(
        self,
        traces: Sequence[Trace],
        advantages_T: Float64,
        path_verdicts: Sequence[PathVerdicts] | None,
        portions: Sequence[np.ndarray],
        batches: Sequence[Sequence[MicroBatch]],
    ) -> None:
        """Gives every target its advantage and its weight in the loss."""
        objective = self.objective
        if objective.path_credit:
            assert path_verdicts is not None, "per-path credit needs each path's verdict"
            advantages = [
                path_advantages(trace.tree, verdicts, advantage, objective.advantage)
                for trace, verdicts, advantage in zip(traces, path_verdicts, advantages_T, strict=True)
            ]
        else:
            advantages = [np.full(len(t.tokens), a) for t, a in zip(traces, advantages_T, strict=True)]
        targets_T = np.array([trace.sampled_count for trace in traces])
        kept_T = complete(traces) if objective.mask_truncated else np.ones(len(traces), bool)
        for portion, micro in zip(portions, batches, strict=True):
            weights_T = np.zeros(len(traces))
            weights_T[portion] = target_weights(
                targets_T[portion], objective.aggregation, objective.constant_length, kept_T[portion]
            )
            weights = [np.full(len(t.tokens), w) for t, w in zip(traces, weights_T, strict=True)]
            for batch in micro:
                batch.spread("advantage", advantages)
                batch.spread("weight", weights)

    def _metrics(self, updates: Sequence[Update]) -> dict[str, float]:
        """Means over the updates; shares of the targets that carry weight."""
        trained = fmean(update.means["trained"] for update in updates)

        def share(name: str) -> float:
            return fmean(update.means.get(name, 0.0) for update in updates) / max(trained, 1e-9)

        metrics = {
            "loss": fmean(update.loss for update in updates),
            "grad_norm": fmean(update.grad_norm for update in updates),
            "entropy": updates[0].entropy,
            "clip_fraction": share("clipped_low") + share("clipped_high"),
            "clip_low": share("clipped_low"),
            "clip_high": share("clipped_high"),
            "kl_old": share("kl_old"),
            "masked": 1 - trained,
            "tokens_trained": round(sum(update.means["trained"] * update.targets for update in updates)),
        }
        if self.objective.dual_clip is not None:
            metrics["clip_dual"] = share("clipped_dual")
        if self.objective.kl != "none" and self.objective.kl_in == "loss":
            metrics["kl"] = share("kl")
        if self.objective.correction != "none":
            metrics["correction"] = share("correction")
            metrics["corrected"] = share("corrected")
            metrics["correction_effective"] = effective_share(share("correction"), share("correction_square"))
        return metrics

    def _mismatch(self, old: Sequence[torch.Tensor], batches: Sequence[MicroBatch]) -> dict[str, float]:
        """How far the engine's log-probs are from the trainer's, over all processes."""
        pairs = [(old_N, batch.values["engine"]) for old_N, batch in zip(old, batches, strict=False)]
        device = self.trainer.device
        largest = all_reduce_max(max((largest_apart(*pair) for pair in pairs), default=0.0), device)
        apart = Mismatch.of(sum_metrics([mismatch_sums(*pair) for pair in pairs], device), largest)
        return {
            "mismatch_max": apart.max,
            "mismatch_mean": apart.mean,
            "mismatch_k3": apart.k3,
            "mismatch_effective": apart.effective,
        }
