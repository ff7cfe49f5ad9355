"""How long a step takes by a machine's rates, phase by phase."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_parallel_r1.planning.cost import Cost
from megatron_parallel_r1.planning.decoding import Draws, rollout_cost
from megatron_parallel_r1.planning.machine import Machine
from megatron_parallel_r1.planning.memory import FLOAT32
from megatron_parallel_r1.planning.training import Rows, Split, scoring_cost, update_cost
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
    rows: Rows
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
    draws = Draws(work.prompts, work.prompt, work.prompts * work.samples, work.concurrent)
    return rollout_cost(work.engine, work.thinking, draws)


def _sync_cost(work: StepWork) -> Cost:
    """In process, weights are gathered over the tensor group, cut anew and copied; servers get them all."""
    size, number = work.split.parallel.tensor, work.split.number
    whole = number * work.elements * size * work.split.parallel.pipeline
    if work.in_process:
        return Cost(node=whole * (size - 1) / size, stream=2 * whole / size + 2 * FLOAT32 * work.elements)
    return Cost(net=whole, stream=2 * whole)
