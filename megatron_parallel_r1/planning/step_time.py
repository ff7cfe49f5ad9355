"""The time of a step at a machine's rates, phase by phase."""

from __future__ import annotations

from dataclasses import dataclass

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
class StepWork:
    """Everything that a step's time depends on.

    Attributes:
        split, engine: the trainer's replicas of the model, and the engines'.
        batch: micro-batches of one update.
        elements: weights of the rank that has most.
        updates: of a step.
        scores_itself: whether the policy before the step scores the traces in a separate pass.
        reference: whether a reference model does.
        thinking: decoding of the traces; None: no rollouts.
        prompt: tokens of a prompt.
        prompts: of one engine.
        samples: traces per prompt.
        concurrent: traces in progress in one engine.
        in_process: whether engines run in the trainer's processes.
        overlaps, fp8: rollouts continue while the trainer works; its products are in FP8.
    """

    split: Split
    engine: Split
    batch: MicroBatches
    elements: int
    updates: int
    scores_itself: bool
    reference: bool
    thinking: Thinking | None
    prompt: int
    prompts: float
    samples: int
    concurrent: int
    in_process: bool
    overlaps: bool
    fp8: bool


def step_time(machine: Machine, work: StepWork) -> StepTime:
    """Returns the time of the slowest rank in each phase."""
    passes = work.updates * (work.scores_itself + work.reference)
    return StepTime(
        sync=machine.seconds(_sync_cost(work)) if work.thinking else 0.0,
        rollout=machine.seconds(_rollout_cost(work)),
        logprobs=machine.seconds(passes * scoring_cost(work.split, work.batch), work.fp8),
        update=machine.seconds(work.updates * update_cost(work.split, work.batch, work.elements), work.fp8),
        overlaps=work.overlaps,
    )


def _rollout_cost(work: StepWork) -> Cost:
    if work.thinking is None:
        return Cost()
    load = RolloutLoad(work.prompts, work.prompt, work.prompts * work.samples, work.concurrent)
    return rollout_cost(work.engine, work.thinking, load)


def _sync_cost(work: StepWork) -> Cost:
    """In process, weights are gathered over the tensor group, resplit and copied; servers get all of them."""
    size, number = work.split.parallel.tensor, work.split.number
    whole = number * work.elements * size * work.split.parallel.pipeline
    if work.in_process:
        return Cost(node=whole * (size - 1) / size, stream=2 * whole / size + 2 * FLOAT32 * work.elements)
    return Cost(net=whole, stream=2 * whole)


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
        return rollout.servers or len(rollout.urls) or max(1, processes // rollout.tensor)

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
        """Returns the time of a step of a stage.

        Args:
            longest: tokens of a row.
            updates: of a step.
            trained: tokens of one update.
            problems: number of problems in the step's rollouts.
            prompt: tokens of a prompt.
        """
        rollout, parallel = self.recipe.rollout, self.recipe.parallel
        in_process = rollout.engine == "native"
        number = getattr(torch, self.recipe.model.dtype).itemsize
        rl = stage if isinstance(stage, RlStage) else None
        tokens = trained / self.data / work.micro_batches
        per_node = self.machine.per_node
        tensor = parallel.tensor if in_process else rollout.tensor
        step = StepWork(
            split=Split(self.shape, parallel, self.data, number, per_node),
            engine=Split(self.shape, ParallelConfig(tensor=tensor), self.engines, number, per_node),
            # A token sees the earlier ones of its own document.
            batch=MicroBatches(work.micro_batches, tokens, longest / 2, tokens),
            elements=max(part.elements for part in self.parts),
            updates=updates,
            scores_itself=updates > 1 or (rl is not None and rl.objective.kl_in == "reward"),
            reference=work.reference,
            thinking=thinking if rl else None,
            prompt=prompt,
            prompts=problems / self.engines,
            samples=rl.samples_per_prompt if rl else 0,
            concurrent=self._concurrent(rl) if rl else 1,
            in_process=in_process,
            overlaps=work.staleness > 0,
            fp8=self.recipe.model.fp8 != "none",
        )
        return step_time(self.machine, step)

    def _concurrent(self, stage: RlStage) -> int:
        """Returns the most traces in progress in one engine."""
        if self.recipe.rollout.engine == "native":
            return stage.max_concurrent_rollouts
        return max(
            1,
            min(
                stage.max_concurrent_rollouts * self.data // self.engines,
                self.recipe.rollout.max_concurrent_requests,
            ),
        )
