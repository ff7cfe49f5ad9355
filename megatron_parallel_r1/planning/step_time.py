"""How long a step takes by a machine's rates, phase by phase."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.config.recipe import Recipe
from megatron_parallel_r1.config.stages import RlStage, SftStage
from megatron_parallel_r1.distributed.parallel_config import ParallelConfig
from megatron_parallel_r1.planning.machine import Cost, Machine
from megatron_parallel_r1.planning.memory import FLOAT32, Workload
from megatron_parallel_r1.planning.rollouts import RolloutLoad, rollout_cost
from megatron_parallel_r1.planning.split import PipelinePart
from megatron_parallel_r1.planning.training import MicroBatches, Split, scoring_cost, update_cost
from megatron_parallel_r1.rollout.settings import Thinking


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one step whose rows are as long as they may be.

    Attributes:
        sync: weights to the engines.
        rollout: all traces are drawn.
        logprobs: of the policy before the step and of the reference, where they are needed.
        update: all updates.
        ahead: whether rollouts go on while the trainer works.
    """

    sync: float
    rollout: float
    logprobs: float
    update: float
    ahead: bool

    @property
    def total(self) -> float:
        learning = self.logprobs + self.update
        return self.sync + (max(self.rollout, learning) if self.ahead else self.rollout + learning)


@dataclass(frozen=True, slots=True)
class StepWork:
    """All that a step's time follows from.

    Attributes:
        split, engine: the trainer's copies of the model, and the engines'.
        rows: of one update.
        elements: weights of the process that has most.
        updates: of a step.
        scores_itself: whether the policy before the step scores the traces in a pass of its own.
        reference: whether another model does.
        thinking: how traces are drawn; None: none are.
        prompt: tokens of one.
        prompts: that one engine gets.
        samples: traces of each.
        concurrent: traces under way in one engine.
        in_process: whether engines live in the trainer's processes.
        ahead, fp8: rollouts go on while the trainer works; its products are in FP8.
    """

    split: Split
    engine: Split
    rows: MicroBatches
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
    ahead: bool
    fp8: bool


def step_time(machine: Machine, work: StepWork) -> StepTime:
    """Of the slowest process of each phase."""
    passes = work.updates * (work.scores_itself + work.reference)
    return StepTime(
        sync=machine.seconds(_sync_cost(work)) if work.thinking else 0.0,
        rollout=machine.seconds(_rollout_cost(work)),
        logprobs=machine.seconds(passes * scoring_cost(work.split, work.rows), work.fp8),
        update=machine.seconds(work.updates * update_cost(work.split, work.rows, work.elements), work.fp8),
        ahead=work.ahead,
    )


def _rollout_cost(work: StepWork) -> Cost:
    if work.thinking is None:
        return Cost()
    draws = RolloutLoad(work.prompts, work.prompt, work.prompts * work.samples, work.concurrent)
    return rollout_cost(work.engine, work.thinking, draws)


def _sync_cost(work: StepWork) -> Cost:
    """In process, weights are gathered over the tensor group, cut anew and copied; servers get them all."""
    size, number = work.split.parallel.tensor, work.split.number
    whole = number * work.elements * size * work.split.parallel.pipeline
    if work.in_process:
        return Cost(node=whole * (size - 1) / size, stream=2 * whole / size + 2 * FLOAT32 * work.elements)
    return Cost(net=whole, stream=2 * whole)


@dataclass(frozen=True, slots=True)
class Timing:
    """What is the same for all stages of a recipe on so many processes."""

    recipe: Recipe
    shape: ModelConfig
    parts: tuple[PipelinePart, ...]
    data: int
    machine: Machine

    @property
    def engines(self) -> int:
        """Models that decode: the trainer's copies, its servers, or as many as it has GPUs for."""
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
        asked: int,
        prompt: int,
    ) -> StepTime:
        """Of a step of a stage.

        Args:
            longest: tokens of a row.
            updates: of a step.
            trained: tokens of one update.
            asked: problems whose traces are drawn.
            prompt: tokens of one.
        """
        rollout, parallel = self.recipe.rollout, self.recipe.parallel
        in_process = rollout.engine == "native"
        number = getattr(torch, self.recipe.model.dtype).itemsize
        rl = stage if isinstance(stage, RlStage) else None
        tokens = trained / self.data / work.micro_batches
        per_node = self.machine.per_node
        tensor = parallel.tensor if in_process else rollout.tensor
        asks = StepWork(
            split=Split(self.shape, parallel, self.data, number, per_node),
            engine=Split(self.shape, ParallelConfig(tensor=tensor), self.engines, number, per_node),
            # A token sees those before it, of its own document alone.
            rows=MicroBatches(work.micro_batches, tokens, longest / 2, tokens),
            elements=max(part.elements for part in self.parts),
            updates=updates,
            scores_itself=updates > 1 or (rl is not None and rl.objective.kl_in == "reward"),
            reference=work.reference,
            thinking=thinking if rl else None,
            prompt=prompt,
            prompts=asked / self.engines,
            samples=rl.samples_per_prompt if rl else 0,
            concurrent=self._concurrent(rl) if rl else 1,
            in_process=in_process,
            ahead=work.staleness > 0,
            fp8=self.recipe.model.fp8 != "none",
        )
        return step_time(self.machine, asks)

    def _concurrent(self, stage: RlStage) -> int:
        """Traces under way in one engine at most."""
        if self.recipe.rollout.engine == "native":
            return stage.max_concurrent_rollouts
        return max(
            1,
            min(
                stage.max_concurrent_rollouts * self.data // self.engines,
                self.recipe.rollout.max_concurrent_requests,
            ),
        )
