"""The time of a step at a machine's rates, phase by phase."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.config.recipe import Recipe
from megatron_parallel_r1.config.stages import RlStage, SftStage
from megatron_parallel_r1.distributed.parallel_config import ParallelConfig
from megatron_parallel_r1.planning.machine import Cost, Machine
from megatron_parallel_r1.planning.memory import FLOAT32, PipelinePart, Workload
from megatron_parallel_r1.planning.rollouts import RolloutLoad, rollout_cost
from megatron_parallel_r1.planning.training import MicroBatches, Split, scoring_cost, update_cost
from megatron_parallel_r1.rollout.settings import Thinking


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one step whose rows have their maximum length.

    Attributes:
        sync: weights to the engines.
        rollout: sampling of all traces.
        logprobs: of the policy before the step and of the reference, where they are needed.
        update: all updates.
        overlaps: whether rollouts continue while the trainer works.
    """

    sync: float
    rollout: float
    logprobs: float
    update: float
    overlaps: bool

    @property
    def total(self) -> float:
        learning = self.logprobs + self.update
        return self.sync + (max(self.rollout, learning) if self.overlaps else self.rollout + learning)


@dataclass(frozen=True, slots=True)
class Timing:
    """What all stages of a recipe share on the given ranks."""

    recipe: Recipe
    shape: ModelConfig
    parts: tuple[PipelinePart, ...]
    data: int
    machine: Machine

    @property
    def engines(self) -> int:
        """Number of engines: the trainer's replicas, its servers, or as many as its GPUs allow."""
        rollout = self.recipe.rollout
        if rollout.engine == "native":
            return self.data
        processes = self.data * self.recipe.parallel.replica_size
        nodes = ceil(processes / self.machine.per_node) if rollout.colocated else 1
        return rollout.servers * nodes or len(rollout.urls) or max(1, processes // rollout.tensor)

    def of(
        self,
        stage: SftStage | RlStage,
        thinking: Thinking,
        work: Workload,
        longest: int,
        updates: int,
        trained: float,
        problems: int,
        prompt: int,
    ) -> StepTime:
        """Returns the time of a step of a stage: of the slowest rank in each phase.

        Args:
            longest: tokens of a row.
            updates: of a step.
            trained: tokens of one update.
            problems: of the step's rollouts, each with a prompt of `prompt` tokens.
        """
        seconds, fp8 = self.machine.seconds, self.recipe.model.fp8 != "none"
        split = self._split(self.recipe.parallel, self.data)
        tokens = trained / self.data / work.micro_batches
        # A token sees the earlier ones of its own document.
        batch = MicroBatches(work.micro_batches, tokens, longest / 2, tokens)
        part = max(self.parts, key=lambda part: part.elements)
        sync, rollout, scores_itself = Cost(), Cost(), updates > 1
        if isinstance(stage, RlStage):
            sync = self._sync_cost(split, part)
            rollout = self._rollout_cost(stage, thinking, problems, prompt)
            # The policy before the step scores the traces in a separate pass.
            scores_itself = scores_itself or stage.objective.kl_in == "reward"
        passes = updates * (scores_itself + work.reference)
        return StepTime(
            sync=seconds(sync),
            rollout=seconds(rollout),
            logprobs=seconds(passes * scoring_cost(split, batch), fp8),
            update=seconds(updates * update_cost(split, batch, part.elements, part.expert_elements), fp8),
            overlaps=work.staleness > 0,
        )

    def _split(self, parallel: ParallelConfig, replicas: int) -> Split:
        number = getattr(torch, self.recipe.model.dtype).itemsize
        return Split(self.shape, parallel, replicas, number, self.machine.per_node)

    def _sync_cost(self, split: Split, part: PipelinePart) -> Cost:
        """In process, weights are gathered over the groups that split them, resplit and copied; servers get
        all."""
        parallel, size = split.parallel, split.parallel.tensor
        dense = (part.elements - part.expert_elements) * size
        elements = dense + part.expert_elements * parallel.expert * parallel.expert_split
        whole = split.number * elements * parallel.pipeline
        if self.recipe.rollout.engine == "native":
            got = whole - split.number * part.elements * parallel.pipeline
            copied = 2 * whole / size + 2 * FLOAT32 * elements / size
            return Cost(node=got, stream=copied)
        return Cost(net=whole, stream=2 * whole)

    def _rollout_cost(self, stage: RlStage, thinking: Thinking, problems: int, prompt: int) -> Cost:
        rollout, tensor = self.recipe.rollout, self.recipe.parallel.tensor
        concurrent = stage.max_concurrent_rollouts
        if rollout.engine != "native":
            tensor = rollout.tensor
            share = concurrent * self.data // self.engines
            concurrent = max(1, min(share, rollout.max_concurrent_requests))
        prompts = problems / self.engines
        load = RolloutLoad(prompts, prompt, prompts * stage.samples_per_prompt, concurrent)
        return rollout_cost(self._split(ParallelConfig(tensor=tensor), self.engines), thinking, load)
