"""A recipe's stages as the work that their steps' time follows from."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.config.recipe import Recipe
from megatron_parallel_r1.config.stages import RlStage, SftStage
from megatron_parallel_r1.distributed.parallel_config import ParallelConfig
from megatron_parallel_r1.planning.machine import Machine
from megatron_parallel_r1.planning.memory import Work
from megatron_parallel_r1.planning.split import Part
from megatron_parallel_r1.planning.step_time import StepTime, StepWork, step_time
from megatron_parallel_r1.planning.training import Rows, Split
from megatron_parallel_r1.rollout.settings import Thinking


@dataclass(frozen=True, slots=True)
class Timing:
    """What is the same for all stages of a recipe on so many processes."""

    recipe: Recipe
    shape: ModelConfig
    parts: tuple[Part, ...]
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
        work: Work,
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
            rows=Rows(work.micro_batches, tokens, longest / 2, tokens),
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
