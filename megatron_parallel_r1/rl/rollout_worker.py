"""Rollouts: prompts become responses, verdicts and rewards.

problems -> prompts -> traces -> verdicts -> rewards -> RolloutBatch
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist

from megatron_parallel_r1.config.data import DataSet
from megatron_parallel_r1.config.stages import RlStage
from megatron_parallel_r1.data.embedded.traces import stated_result
from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.data.prompts import encode_prompt
from megatron_parallel_r1.data.sampler import ProblemStream
from megatron_parallel_r1.distributed.replicas import gather_from_replicas, is_replica_leader, replica_slice
from megatron_parallel_r1.rewards.base import Judged, Reward, reward_metrics
from megatron_parallel_r1.rewards.verification import extract_answer
from megatron_parallel_r1.rewards.verifier import Verifier
from megatron_parallel_r1.rl.metrics import group_metrics, judge_traces, staleness_metrics, trace_metrics
from megatron_parallel_r1.rl.objective.filtering import informative
from megatron_parallel_r1.rl.path_results import (
    PathVerdicts,
    Stated,
    judge_paths,
    stated_value,
    summary_metrics,
)
from megatron_parallel_r1.rl.rollout_batch import RolloutBatch, Rollouts
from megatron_parallel_r1.rollout.engine import Engine
from megatron_parallel_r1.rollout.thinking import Thinker, roll_out
from megatron_parallel_r1.run.context import RunContext
from megatron_parallel_r1.thought.trace import Trace
from megatron_parallel_r1.utils.seeding import seed_series
from megatron_parallel_r1.utils.timers import Timers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class RolloutWorker:
    """Makes the batches of a stage.

    Attributes:
        seed: with the step it fixes all draws of a batch.
        reward: a pure function of a judged trace and the step, counted from 0.
        template: of the prompt.
        read_result: reads the result off the text of a path or a summary.
        timers: `draw` and `verify` take the seconds of sampling and of verification.
        world: all ranks, for the thread that rolls out ahead of training; None: the default group.
    """

    stage: RlStage
    problems: ProblemStream[Problem]
    thinker: Thinker[Any]
    tokenizer: PreTrainedTokenizerBase
    verifier: Verifier
    seed: int
    reward: Reward
    template: str
    read_result: Stated
    timers: Timers
    world: dist.ProcessGroup | None = None

    @classmethod
    def of(
        cls,
        run: RunContext,
        stage: RlStage,
        engine: Engine[Any],
        problems: ProblemStream[Problem],
        verifier: Verifier,
        timers: Timers,
        world: dist.ProcessGroup | None,
    ) -> RolloutWorker:
        """The worker of a stage of a run."""
        return cls(
            stage,
            problems,
            Thinker(engine, run.tags, run.recipe.thinking_of(stage)),
            run.tokenizer,
            verifier,
            seed=run.seed_of(stage.name, "rollout"),
            reward=stage.reward.make(),
            template=run.recipe.prompt_template,
            read_result=stated_value if isinstance(stage.data, DataSet) else _embedded_result,
            timers=timers,
            world=world,
        )

    def next_batch(self, step: int) -> RolloutBatch:
        """Samples, verifies and scores the responses of a step with the weights that the engine holds.

        `samples_per_prompt` responses to each of `prompts_per_step` prompts, and to more if dynamic sampling
        wants them. If even its last round leaves too few groups with rewards that differ, the batch is
        smaller; if it leaves none, all groups are trained, with advantages of 0.

        Args:
            step: of the stage, from 1; rewards count from 0.
        """
        prompts, samples, dynamic = (
            self.stage.prompts_per_step,
            self.stage.samples_per_prompt,
            self.stage.dynamic_sampling,
        )
        everything, trained = Rollouts([], [], [], []), Rollouts([], [], [], [])
        rounds = 0
        for _ in range(dynamic.max_rounds if dynamic else 1):
            rounds += 1
            missing = prompts - len(trained) // samples
            count = missing if dynamic is None else math.ceil(missing * dynamic.oversampling)
            fresh = self._generate(step, count, first_response=len(everything))
            everything = everything + fresh
            useful = np.ones(count, bool)
            if dynamic is not None:
                useful = informative(np.reshape(fresh.rewards, (count, samples)))
            trained = trained + fresh.groups(np.flatnonzero(useful)[:missing].tolist(), samples)
            if len(trained) == prompts * samples:
                break
        return RolloutBatch(everything, trained if len(trained) else everything, rounds)

    def judge_paths(self, batch: RolloutBatch) -> list[PathVerdicts]:
        """Verifies what each path of the trained traces found by itself, for per-path credit."""
        trained = batch.trained
        with self.timers.of("verify"):
            return judge_paths(
                trained.traces, trained.problems, self.tokenizer, self.verifier, self.read_result
            )

    def metrics(self, batch: RolloutBatch, step: int) -> dict[str, Any]:
        """Rewards and the shape of all traces of a step, trained or not."""
        everything, samples = batch.all, self.stage.samples_per_prompt
        return {
            **reward_metrics(everything.scores),
            "reward_term": self.reward.term(step - 1),
            **trace_metrics(everything.traces, everything.judged),
            **group_metrics(everything.judged, samples),
            **summary_metrics(everything.traces, self.tokenizer, self.read_result),
            **staleness_metrics(everything.traces, step, self.stage.max_off_policy_steps, samples),
            "groups": len(everything) // samples,
            "groups_dropped": (len(everything) - len(batch.trained)) // samples,
            "rounds": batch.rounds,
            "tokens": sum(len(trace.tokens) for trace in everything.traces),
        }

    def _generate(self, step: int, count: int, first_response: int) -> Rollouts:
        """A group of responses to each of the next `count` problems.

        Args:
            first_response: responses that the step has already; the n-th of a step has the same draws in any
                batch.
        """
        problems = [p for p in self.problems.next_batch(count) for _ in range(self.stage.samples_per_prompt)]
        total = first_response + len(problems)
        seeds = seed_series(total, self.seed, step)[first_response:]
        traces, judged = sample_and_verify(
            self.thinker,
            problems,
            seeds,
            self.tokenizer,
            self.template,
            self.verifier,
            self.stage.max_concurrent_rollouts,
            self.world,
            self.timers,
        )
        return Rollouts(problems, traces, judged, [self.reward.score(j, step - 1) for j in judged])


def sample_and_verify(
    thinker: Thinker[Any],
    problems: Sequence[Problem],
    seeds: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    verifier: Verifier,
    concurrent: int,
    world: dist.ProcessGroup | None = None,
    timers: Timers | None = None,
) -> tuple[list[Trace], list[Judged]]:
    """One response to each problem, verified. Each replica works on its share; all ranks get all, in order.

    Args:
        seeds: of each problem's response, so that its draws do not depend on which replica makes them.
        concurrent: responses in flight at most, of one replica.
        world: all ranks, if not by the default group; a second thread needs its own.
        timers: adds the seconds of `draw` and `verify`.
    """
    own_problems, own_seeds = replica_slice(problems), replica_slice(seeds)
    timers = timers or Timers()

    def work() -> list[tuple[Trace, Judged]]:
        if not (is_replica_leader() or thinker.engine.runs_on_all_ranks):
            return []
        prompts = [encode_prompt(tokenizer, template, problem.prompt) for problem in own_problems]
        with timers.of("draw"):
            traces = asyncio.run(roll_out(thinker, prompts, own_seeds, concurrent))
        # One verdict for all ranks of a replica: a time-out could give each another one.
        with timers.of("verify"):
            judged = judge_traces(traces, own_problems, tokenizer, verifier) if is_replica_leader() else []
        return list(zip(traces, judged, strict=False))

    pairs = gather_from_replicas(work, world)
    return [trace for trace, _ in pairs], [judgement for _, judgement in pairs]


def _embedded_result(text: str) -> str | None:
    return extract_answer(text) or stated_result(text)
