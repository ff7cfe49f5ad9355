"""One step of GRPO (arXiv 2402.03300) and its family with rollouts that think in parallel.

problems -> traces -> judged -> rewards -> advantages -> rows -> updates -> metrics
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.data.prompts import encode_prompt
from megatron_parallel_r1.distributed.replicas import gather_from_replicas, is_replica_leader, replica_slice
from megatron_parallel_r1.rewards.base import Judged, Reward, reward_metrics
from megatron_parallel_r1.rewards.verifier import Verifier
from megatron_parallel_r1.rl.learner import Learner
from megatron_parallel_r1.rl.metrics import group_metrics, judge_traces, staleness_metrics, trace_metrics
from megatron_parallel_r1.rl.objective.filtering import DynamicSampling
from megatron_parallel_r1.rl.path_metrics import Stated, summary_metrics
from megatron_parallel_r1.rl.path_verdicts import judge_paths
from megatron_parallel_r1.rl.rollout_batch import Collected, collect
from megatron_parallel_r1.rollout.thinking import Thinker, roll_out
from megatron_parallel_r1.thought.trace import Trace
from megatron_parallel_r1.utils.timers import Phases

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Grpo:
    """What every step uses.

    Attributes:
        reward: a pure function of a judged trace and the step, counted from 0.
        template: of the prompt.
        prompts, samples: problems of a step, and traces of each.
        dynamic: dynamic sampling; None: every group is trained.
        concurrent: traces in flight at most.
        max_staleness: updates that a trace may be behind the weights that it trains.
        world: all processes, for the thread that rolls out; None: the default group.
        stated: reads the result off the text of a path or a summary.
    """

    learner: Learner
    thinker: Thinker[Any]
    tokenizer: PreTrainedTokenizerBase
    verifier: Verifier
    reward: Reward
    template: str
    prompts: int
    samples: int
    dynamic: DynamicSampling | None
    concurrent: int
    stated: Stated
    max_staleness: int = 0
    world: dist.ProcessGroup | None = None

    @property
    def phases(self) -> Phases:
        """What the parts of a step cost, rollout and learning alike."""
        return self.learner.phases

    def roll_out(self, next_problems: Callable[[int], Sequence[Problem]], step: int, seed: int) -> Collected:
        """The groups of a step, with the weights that the engine holds.

        Args:
            next_problems: hands out so many further problems.
            step: of the stage, from 1.
            seed: fixes all draws of this step.
        """
        return collect(
            next_problems,
            self._roll_out,
            self.reward,
            prompts=self.prompts,
            samples=self.samples,
            step=step,
            seed=seed,
            dynamic=self.dynamic,
        )

    def learn(self, collected: Collected, step: int, lr: float) -> dict[str, float]:
        """All updates of a step."""
        kept = collected.kept
        verdicts = None
        if self.learner.objective.path_credit:
            with self.phases.of("verify"):
                verdicts = judge_paths(kept.traces, kept.problems, self.tokenizer, self.verifier, self.stated)
        return self.learner.learn(kept.traces, kept.rewards, lr, verdicts)

    def measure(self, collected: Collected, step: int) -> dict[str, Any]:
        """What the traces of a step look like, kept or not."""
        everything = collected.all
        return {
            **reward_metrics(everything.scores),
            "reward_term": self.reward.term(step - 1),
            **trace_metrics(everything.traces, everything.judged),
            **group_metrics(everything.judged, self.samples),
            **summary_metrics(everything.traces, self.tokenizer, self.stated),
            **staleness_metrics(everything.traces, step, self.max_staleness, self.samples),
            "groups": len(everything) // self.samples,
            "groups_dropped": (len(everything) - len(collected.kept)) // self.samples,
            "rounds": collected.rounds,
            "tokens": sum(len(trace.tokens) for trace in everything.traces),
        }

    def _roll_out(
        self, problems: Sequence[Problem], seeds: Sequence[int]
    ) -> tuple[list[Trace], list[Judged]]:
        return roll_out_and_judge(
            self.thinker,
            problems,
            seeds,
            self.tokenizer,
            self.template,
            self.verifier,
            self.concurrent,
            self.world,
            self.phases,
        )


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def roll_out_and_judge(
    thinker: Thinker[Any],
    problems: Sequence[Problem],
    seeds: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    verifier: Verifier,
    concurrent: int,
    world: dist.ProcessGroup | None = None,
    phases: Phases | None = None,
) -> tuple[list[Trace], list[Judged]]:
    """One trace of each problem. Each copy works on its share; all processes get all, in order.

    Args:
        seeds: of each problem's trace, so that its draws do not depend on who makes them.
        concurrent: traces in flight at most, of one copy.
        phases: takes down what `draw` and `verify` cost.
        world: all processes, if not by the default group; a second thread needs its own.
    """
    mine, my_seeds = replica_slice(problems), replica_slice(seeds)
    phases = phases or Phases()

    def work() -> list[tuple[Trace, Judged]]:
        if not (is_replica_leader() or thinker.engine.together):
            return []
        prompts = [encode_prompt(tokenizer, template, problem.prompt) for problem in mine]
        with phases.of("draw"):
            traces = asyncio.run(roll_out(thinker, prompts, my_seeds, concurrent))
        # One verdict for all processes of a copy: a time-out could give each another one.
        with phases.of("verify"):
            judged = judge_traces(traces, mine, tokenizer, verifier) if is_replica_leader() else []
        return list(zip(traces, judged, strict=False))

    pairs = gather_from_replicas(work, world)
    return [trace for trace, _ in pairs], [judgement for _, judgement in pairs]
