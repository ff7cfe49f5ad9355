"""The learner: turns traces and rewards into advantages, a loss and optimizer steps.

    traces -> packed rows -> old and reference log-probs -> penalties -> advantages -> weights -> updates

Every token is trained under the layout of the mode that it was sampled in, so the engine's log-probs equal
the trainer's up to rounding; every step measures the difference.

Departs from the paper: the ratio's denominator is the trainer's own log-prob at the start of the step. A step
with one update computes that log-prob anyway and needs no separate pass.

Shapes: R traces of a step; N targets of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from numpy.typing import NDArray

from megatron_parallel_r1.config.objective import Objective
from megatron_parallel_r1.config.stages import RlStage
from megatron_parallel_r1.distributed.collectives import all_reduce_max, run_on_rank_zero, sum_metrics
from megatron_parallel_r1.rl.expert_exchange import fetch_experts
from megatron_parallel_r1.rl.objective.advantage import (
    ADVANTAGES,
    Float64,
    path_advantages,
    scored_advantages,
)
from megatron_parallel_r1.rl.objective.aggregation import target_weights
from megatron_parallel_r1.rl.objective.correction import effective_share
from megatron_parallel_r1.rl.objective.kl import kl_penalties
from megatron_parallel_r1.rl.objective.loss import policy_loss
from megatron_parallel_r1.rl.objective.mismatch import Mismatch, largest_apart, mismatch_sums
from megatron_parallel_r1.rl.objective.overlong import complete, overlong_penalties
from megatron_parallel_r1.rl.packed_trace import PackedTrace
from megatron_parallel_r1.rl.path_results import PathVerdicts
from megatron_parallel_r1.rl.reference import Reference, make_reference
from megatron_parallel_r1.run.context import RunContext
from megatron_parallel_r1.thought.layout import Mode, lay_out, row_length
from megatron_parallel_r1.thought.tags import Tags
from megatron_parallel_r1.thought.trace import Outline
from megatron_parallel_r1.train.micro_batch import MicroBatch, pack_share, partition
from megatron_parallel_r1.train.routing import recorded_experts, row_experts
from megatron_parallel_r1.train.trainer import Trainer, Update
from megatron_parallel_r1.utils.devices import to_device
from megatron_parallel_r1.utils.rounding import RoundingLimits, rounding_limits
from megatron_parallel_r1.utils.timers import Timers

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class BatchConfig:
    """How a step's traces are split into updates and micro-batches.

    Attributes:
        samples: traces per group.
        epochs: passes over the traces.
        mini_batches: updates per pass.
        micro_tokens: largest number of tokens of a packed row.
        max_response_tokens: limit of the over-long penalty.
    """

    samples: int
    epochs: int
    mini_batches: int
    micro_tokens: int
    max_response_tokens: int


@dataclass(frozen=True, slots=True)
class MiniBatch:
    """The traces of one update.

    Attributes:
        traces: indices into the step's traces, the same on every rank.
        own: those that this rank trains.
        micro_batches: this rank's packed rows.
    """

    traces: np.ndarray
    own: list[int]
    micro_batches: list[MicroBatch]


@dataclass(frozen=True, slots=True)
class PolicyBatch:
    """The traces of a step, packed, with the log-probs from before the step.

    Attributes:
        outlines: of all traces, the same on every rank.
        penalties: float64 [R] each, added to the rewards; keyed by metric name.
    """

    outlines: Sequence[Outline]
    mini_batches: list[MiniBatch]
    penalties: dict[str, Float64]

    def micro_batches(self) -> Iterator[MicroBatch]:
        """All micro-batches of this rank."""
        return (micro_batch for mini in self.mini_batches for micro_batch in mini.micro_batches)


@dataclass(frozen=True, slots=True)
class Learner:
    """Trains a policy on an objective.

    Attributes:
        reference: the reference policy, if the objective has a KL term.
        timers: `logprobs` times the forward passes before the updates, `update` the updates.
    """

    trainer: Trainer
    objective: Objective
    batch: BatchConfig
    mode: Mode
    tags: Tags
    reference: Reference | None = None
    timers: Timers = field(default_factory=Timers)

    @classmethod
    def of(cls, run: RunContext, stage: RlStage, trainer: Trainer, timers: Timers, done: int) -> Learner:
        """Builds the learner of a stage.

        Args:
            done: last finished step.
        """
        thinking = run.recipe.thinking_of(stage)
        return cls(
            trainer,
            stage.objective,
            BatchConfig(
                stage.samples_per_prompt,
                stage.epochs,
                stage.mini_batches,
                run.recipe.max_tokens_per_micro_batch,
                thinking.max_response_tokens,
            ),
            thinking.mode,
            run.tags,
            make_reference(run, stage, done) if stage.objective.kl != "none" else None,
            timers,
        )

    def prepare(self, traces: Sequence[PackedTrace]) -> PolicyBatch:
        """Packs traces into micro-batches and computes the log-probs and penalties that the step needs.

        Args:
            traces: consecutive whole groups, the same on every rank.
        """
        mini_batches = self._pack(traces)
        with self.timers.of("logprobs"):
            self._compute_logprobs(mini_batches)
        outlines = [trace.outline for trace in traces]
        return PolicyBatch(outlines, mini_batches, self._penalties(outlines, mini_batches))

    def advantages(self, batch: PolicyBatch, rewards: Sequence[float | None]) -> Float64 | np.ma.MaskedArray:
        """Computes the advantages of the traces, float64 [R], from rewards plus penalties.

        Those of traces without a reward are masked.
        """
        rewards_R = np.array(rewards, float)  # None becomes NaN
        totals_R = rewards_R + sum(batch.penalties.values())
        shape, name = (-1, self.batch.samples), self.objective.advantage

        def compute() -> Float64 | np.ma.MaskedArray:
            unscored_PG = np.isnan(rewards_R).reshape(shape)
            return scored_advantages(name, totals_R.reshape(shape), unscored_PG).ravel()

        return self._on_one_rank(compute)

    def _on_one_rank(self, estimate: Callable[[], T]) -> T:
        """Runs what calls the advantage's estimator: a user's function may differ from rank to rank."""
        return estimate() if self.objective.advantage in ADVANTAGES else run_on_rank_zero(estimate)

    def update(
        self,
        batch: PolicyBatch,
        advantages_R: Float64 | np.ma.MaskedArray,
        lr: float,
        path_verdicts: Sequence[PathVerdicts] | None = None,
    ) -> dict[str, float]:
        """Makes all updates of a step: for each mini-batch, policy loss, gradient and optimizer step.

        Args:
            advantages_R: a masked one leaves its trace out of the loss.
            path_verdicts: verdicts of each trace's paths, for per-path credit.

        Returns:
            Metrics of the step.

        Raises:
            NotFinite: the loss or gradient of an update is not finite; it and later updates are not made.
        """
        self._spread_targets(batch, advantages_R, path_verdicts)

        def loss(
            logprobs_N: torch.Tensor, entropies_N: torch.Tensor, micro_batch: MicroBatch
        ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            values, segments = micro_batch.values, micro_batch.segments
            return policy_loss(logprobs_N, entropies_N, values, self.objective, segments)

        with self.timers.of("update"):
            updates = [
                self.trainer.update(mini_batch.micro_batches, loss, lr)
                for _ in range(self.batch.epochs)
                for mini_batch in batch.mini_batches
            ]
        penalties = {name: float(penalties_R.mean()) for name, penalties_R in batch.penalties.items()}
        return self._metrics(updates) | penalties | self._mismatch(batch, updates)

    def _pack(self, traces: Sequence[PackedTrace]) -> list[MiniBatch]:
        """Packs the mini-batches. Groups stay whole, so that the advantages of each mini-batch sum to 0.

        A rank lays out only the traces that it trains.
        """
        lengths = [row_length(t.outline.prompt_length, t.outline.tree, self.mode) for t in traces]
        groups = np.arange(len(traces)).reshape(-1, self.batch.samples)
        count = min(self.batch.mini_batches, len(groups))
        device, place, model = self.trainer.device, self.trainer.partition, self.trainer.model.architecture
        parts = [part.ravel() for part in np.array_split(groups, count)]
        shares = [partition(lengths, self.batch.micro_tokens, place, part.tolist()) for part in parts]
        wanted = {index for share in shares for chosen in share for index in chosen}
        experts = fetch_experts(traces, wanted) if self.objective.replay_experts else {}
        mini_batches = []
        for indices, share in zip(parts, shares, strict=True):
            own = {i: traces[i] for chosen in share for i in chosen}
            rows = {
                i: lay_out(t.prompt, t.column("tokens"), t.column("sampled"), t.outline.tree, self.mode)
                for i, t in own.items()
            }
            engine = {"engine": {i: t.column("logprobs") for i, t in own.items()}}
            suppressed = {i: t.column("suppressed") for i, t in own.items()}
            micro_batches = [
                MicroBatch.of(row, device, engine, suppressed, self.tags.parallel)
                for row in pack_share(rows, share, place)
            ]
            if experts:
                chosen = {i: recorded_experts(experts[i], lengths[i], model) for i in own if i in experts}
                micro_batches = [self._with_experts(batch, chosen) for batch in micro_batches]
            mini_batches.append(MiniBatch(indices, list(own), micro_batches))
        return mini_batches

    def _with_experts(self, batch: MicroBatch, recorded: Mapping[int, NDArray[np.int16]]) -> MicroBatch:
        """Adds the experts that the engine chose, where it recorded them for all traces of the row."""
        if not batch.row.segment_ids or not recorded.keys() >= set(batch.row.segment_ids):
            return batch
        experts_LXC = row_experts(batch.row, recorded, self.trainer.partition)
        return replace(batch, experts_LXC=to_device(experts_LXC, self.trainer.device))

    def _compute_logprobs(self, mini_batches: Sequence[MiniBatch]) -> None:
        """Adds the log-probs of the old and the reference policy to micro-batches, where needed."""
        is_single_update = self.batch.epochs * len(mini_batches) == 1
        if not is_single_update or self.objective.kl_in == "reward":
            for mini_batch in mini_batches:
                old = self.trainer.logprobs(mini_batch.micro_batches)
                # Only the last pipeline stage has log-probs and needs them.
                for micro_batch, old_N in zip(mini_batch.micro_batches, old, strict=False):
                    micro_batch.values["old"] = old_N
        if self.reference is not None:
            for mini_batch in mini_batches:
                self.reference.score(mini_batch.micro_batches)

    def _penalties(
        self, outlines: Sequence[Outline], mini_batches: Sequence[MiniBatch]
    ) -> dict[str, Float64]:
        objective = self.objective
        penalties: dict[str, Float64] = {}
        if objective.overlong_cache:
            lengths_R = np.array([outline.length for outline in outlines])
            penalties["penalty_overlong"] = overlong_penalties(
                lengths_R,
                self.batch.max_response_tokens,
                objective.overlong_cache,
                objective.overlong_penalty,
            )
        if objective.kl != "none" and objective.kl_in == "reward":
            micro_batches = [micro_batch for mini in mini_batches for micro_batch in mini.micro_batches]
            penalties["penalty_kl"] = self._kl_penalties(len(outlines), micro_batches)
        return penalties

    def _kl_penalties(self, count: int, micro_batches: Sequence[MicroBatch]) -> Float64:
        """KL penalties of all traces, float64 [R], summed over ranks; equal on all ranks."""
        sums_R = torch.zeros(count, dtype=torch.float64, device=self.trainer.device)
        for micro_batch in micro_batches:
            if "reference" in micro_batch.values:
                sums_R[list(micro_batch.row.segment_ids)] = kl_penalties(
                    micro_batch.values["old"],
                    micro_batch.values["reference"],
                    self.objective.kl,
                    self.objective.kl_coefficient,
                    micro_batch.segments,
                )
        # Ranks of a tensor or context group hold the same totals: count one of them.
        others = (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_context_parallel_rank(),
        )
        if any(others):
            sums_R.zero_()
        if dist.get_world_size() > 1:
            dist.all_reduce(sums_R)
        return sums_R.cpu().numpy()

    def _spread_targets(
        self,
        batch: PolicyBatch,
        advantages_R: Float64 | np.ma.MaskedArray,
        path_verdicts: Sequence[PathVerdicts] | None,
    ) -> None:
        """Adds each target's advantage and its weight in the loss to the micro-batches."""
        objective, outlines = self.objective, batch.outlines
        kept_R = ~np.ma.getmaskarray(advantages_R)
        advantages_R = np.ma.filled(advantages_R, 0.0)
        own = [index for mini_batch in batch.mini_batches for index in mini_batch.own]
        if objective.path_credit:
            assert path_verdicts is not None, "per-path credit needs each path's verdict"
            # A user's estimator runs on one rank, for the traces of all.
            indices = own if objective.advantage in ADVANTAGES else range(len(outlines))
            judged = list(zip(outlines, path_verdicts, advantages_R, strict=True))
            advantages = self._on_one_rank(
                lambda: {
                    index: path_advantages(outline.tree, verdicts, advantage, objective.advantage)
                    for index, (outline, verdicts, advantage) in ((index, judged[index]) for index in indices)
                }
            )
        else:
            advantages = {index: np.full(outlines[index].length, advantages_R[index]) for index in own}
        targets_R = np.array([outline.sampled_count for outline in outlines])
        if objective.mask_truncated:
            kept_R &= complete(outlines)
        for mini_batch in batch.mini_batches:
            chosen = mini_batch.traces
            weights_R = np.zeros(len(outlines))
            weights_R[chosen] = target_weights(
                targets_R[chosen], objective.aggregation, objective.constant_length, kept_R[chosen]
            )
            weights = {index: np.full(outlines[index].length, weights_R[index]) for index in mini_batch.own}
            for micro_batch in mini_batch.micro_batches:
                micro_batch.spread("advantage", advantages)
                micro_batch.spread("weight", weights)

    def _metrics(self, updates: Sequence[Update]) -> dict[str, float]:
        """Means over the updates; shares are of the targets with a weight."""
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

    def _mismatch(self, batch: PolicyBatch, updates: Sequence[Update]) -> dict[str, float]:
        """Compares the engine's log-probs with the trainer's before the step, over all ranks."""
        micro_batches = list(batch.micro_batches())
        old = [m.values["old"] for m in micro_batches if "old" in m.values] or updates[0].logprobs
        pairs = [(old_N, m.values["engine"]) for old_N, m in zip(old, micro_batches, strict=False)]
        device = self.trainer.device
        largest, scale = all_reduce_max(largest_apart(pairs), device)
        apart = Mismatch.of(sum_metrics([mismatch_sums(*pair) for pair in pairs], device), largest)
        return {
            "mismatch_max": apart.max,
            "mismatch_mean": apart.mean,
            "mismatch_k3": apart.k3,
            "mismatch_effective": apart.effective,
            "mismatch_rounding": self._rounding(scale).largest,
        }

    def _rounding(self, scale: float) -> RoundingLimits:
        """The mismatch that rounding explains at log-probs to `scale`, at least those of a uniform choice."""
        model = self.trainer.model
        dtype = "float8_e4m3fn" if model.config.fp8 else str(model.config.params_dtype).removeprefix("torch.")
        nats = math.log(model.architecture.vocab) / self.trainer.temperature
        return rounding_limits([dtype], model.architecture.layers, max(scale, nats))
