"""The rollout worker: turns problems into responses, verdicts and rewards.

problems -> prompts -> traces -> verdicts -> rewards -> RolloutBatch
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist

from megatron_parallel_r1.config.data import data_sets, has_sources
from megatron_parallel_r1.config.stages import RlStage
from megatron_parallel_r1.data.embedded.traces import stated_result
from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.data.prompts import encode_prompt
from megatron_parallel_r1.data.sampler import ProblemStream
from megatron_parallel_r1.distributed.collectives import (
    gather_from_replicas,
    is_replica_leader,
    replica_slice,
)
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rewards.base import Judged, Reward, reward_metrics
from megatron_parallel_r1.rewards.verification import extract_answer
from megatron_parallel_r1.rewards.verifier import Verifier
from megatron_parallel_r1.rl.expert_exchange import with_own
from megatron_parallel_r1.rl.metrics import (
    group_metrics,
    judge_traces,
    source_metrics,
    staleness_metrics,
    trace_metrics,
)
from megatron_parallel_r1.rl.objective.advantage import informative
from megatron_parallel_r1.rl.packed_trace import PackedTrace
from megatron_parallel_r1.rl.path_results import (
    PathVerdicts,
    ReadResult,
    judge_paths,
    stated_value,
    summary_metrics,
)
from megatron_parallel_r1.rl.rollout_batch import RolloutBatch, Rollouts
from megatron_parallel_r1.rl.scoring import keep_unscored, score
from megatron_parallel_r1.rollout.engine import Engine
from megatron_parallel_r1.rollout.thinking import Thinker, roll_out
from megatron_parallel_r1.run.context import RunContext
from megatron_parallel_r1.utils.seeding import seed_series
from megatron_parallel_r1.utils.timers import Timers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class RolloutWorker:
    """Generates, verifies and scores the batches of a stage.

    Attributes:
        seed: determines, with the step, all draws of a batch.
        reward: of a judged trace and the step, counted from 0.
        folder: of the stage, for traces that could not be scored.
        template: name of the prompt template.
        read_result: reads the result off the text of a path or a summary.
        timers: of the training thread; `verify_paths` times the verification of paths.
        world: process group of all ranks for a second thread; None: the default group.
    """

    stage: RlStage
    problems: ProblemStream[Problem]
    thinker: Thinker[Any]
    tokenizer: PreTrainedTokenizerBase
    verifier: Verifier
    seed: int
    reward: Reward
    template: str
    read_result: ReadResult
    timers: Timers
    folder: Path
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
        """Builds the rollout worker of a stage."""
        replays_experts = run.shape.experts is not None and stage.objective.replay_experts
        return cls(
            stage,
            problems,
            Thinker(engine, run.tags, run.recipe.thinking_of(stage), replays_experts),
            run.tokenizer,
            verifier,
            seed=run.seed_of(stage.name, "rollout"),
            reward=stage.reward.make(),
            template=run.recipe.prompt_template,
            read_result=stated_value if data_sets(stage.data) else _embedded_result,
            timers=timers,
            folder=run.stage_folder(stage.name),
            world=world,
        )

    def next_batch(self, step: int) -> RolloutBatch:
        """Samples, verifies and scores the responses of a step with the engine's current weights.

        Samples `samples_per_prompt` responses to each of `prompts_per_step` prompts. Dynamic sampling
        replaces groups of equal rewards: if too few groups differ after its last round, the batch is smaller;
        if none do, all groups are trained, with advantages of 0.

        Args:
            step: step of the stage, from 1; rewards count from 0.

        Raises:
            UserError: a user's reward failed, or gave no trace a value; the step's traces are kept in a file.
        """
        prompts, samples, dynamic = (
            self.stage.prompts_per_step,
            self.stage.samples_per_prompt,
            self.stage.dynamic_sampling,
        )
        self.problems.begin_step(step)
        everything, trained = Rollouts([], [], [], []), Rollouts([], [], [], [])
        rounds, timers = 0, Timers()
        for _ in range(dynamic.max_rounds if dynamic else 1):
            rounds += 1
            missing = prompts - len(trained) // samples
            count = missing if dynamic is None else math.ceil(missing * dynamic.oversampling)
            fresh = self._generate(step, count, len(everything), timers)
            fresh = self._score(fresh, everything, step, timers)
            everything = everything + fresh
            useful = np.ones(count, bool)
            if dynamic is not None:
                useful = informative(np.array(fresh.rewards, float).reshape(count, samples))
            trained = trained + fresh.groups(np.flatnonzero(useful)[:missing].tolist(), samples)
            if len(trained) == prompts * samples:
                break
        batch = RolloutBatch(everything, trained if len(trained) else everything, rounds, timers.take())
        if all(reward is None for reward in batch.trained.rewards):
            path = keep_unscored(everything, step, self.folder, self.tokenizer)
            raise UserError(
                f"stage {self.stage.name}, step {step}: no trace has a reward, there is nothing to train on; "
                f"the step's traces are in {path}"
            )
        return batch

    def judge_paths(self, batch: RolloutBatch) -> list[PathVerdicts]:
        """Verifies the result of each path of the trained traces, for per-path credit."""
        trained = batch.trained
        with self.timers.of("verify_paths"):
            return judge_paths(
                trained.traces, trained.problems, self.tokenizer, self.verifier, self.read_result
            )

    def metrics(self, batch: RolloutBatch, step: int) -> dict[str, Any]:
        """Metrics over all traces of a step, trained or not: rewards, accuracy, paths, staleness."""
        everything, samples = batch.all, self.stage.samples_per_prompt
        return {
            **reward_metrics(everything.scores),
            "unscored": fmean(reward is None for reward in everything.rewards),
            "scoring_timeouts": sum(score.timeouts for score in everything.scores),
            "reward_term": self.reward.term(step - 1),
            **trace_metrics(everything.outlines, everything.judged),
            **group_metrics(everything.judged, samples),
            **(source_metrics(everything) if has_sources(self.stage.data) else {}),
            **summary_metrics(everything.traces, self.tokenizer, self.read_result),
            **staleness_metrics(everything.outlines, step, self.stage.max_off_policy_steps, samples),
            "groups": len(everything) // samples,
            "groups_dropped": (len(everything) - len(batch.trained)) // samples,
            "rounds": batch.rounds,
            "tokens": sum(outline.length for outline in everything.outlines),
            **batch.times,
        }

    def _generate(self, step: int, count: int, first_response: int, timers: Timers) -> Rollouts:
        """Generates and verifies a group of responses to each of the next `count` problems; no scores yet.

        Args:
            first_response: number of responses that the step has already; the n-th response of a step has the
                n-th seed.
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
            timers,
        )
        return Rollouts(problems, traces, judged, [])

    def _score(self, fresh: Rollouts, earlier: Rollouts, step: int, timers: Timers) -> Rollouts:
        """Adds the scores to the traces of a round.

        Args:
            earlier: traces of the step's earlier rounds.
        """
        samples = self.stage.samples_per_prompt
        try:
            with timers.of("score"):
                scores = score(
                    self.reward, fresh, samples, step - 1, self.tokenizer, len(earlier), self.world
                )
        except UserError as error:
            path = keep_unscored(earlier + fresh, step, self.folder, self.tokenizer)
            raise UserError(f"{error}; the step's traces are in {path}") from error.__cause__
        return replace(fresh, scores=scores)


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
) -> tuple[list[PackedTrace], list[Judged]]:
    """Samples and verifies a response to each problem; replicas share the work, every rank gets all.

    Args:
        seeds: a seed per response, so that its draws do not depend on the replica.
        concurrent: largest number of responses in flight per replica.
        world: process group of all ranks, which a second thread needs; None: the default group.
        timers: `draw` times sampling, `verify` verification.
    """
    own_problems, own_seeds = replica_slice(problems), replica_slice(seeds)
    timers = timers or Timers()

    def work() -> list[tuple[PackedTrace, Judged]]:
        if not (is_replica_leader() or thinker.engine.runs_on_all_ranks):
            return []
        prompts = [encode_prompt(tokenizer, template, problem) for problem in own_problems]
        with timers.of("draw"):
            traces = asyncio.run(roll_out(thinker, prompts, own_seeds, concurrent))
        # The leader verifies for all ranks of its replica: with time-outs, verdicts could differ.
        if not is_replica_leader():
            return []
        with timers.of("verify"):
            judged = judge_traces(traces, own_problems, tokenizer, verifier)
        own.extend(map(PackedTrace.of, traces))
        return [(trace.without_experts, verdict) for trace, verdict in zip(own, judged, strict=True)]

    own: list[PackedTrace] = []
    pairs = gather_from_replicas(work, world)
    return with_own([trace for trace, _ in pairs], own), [judgement for _, judgement in pairs]


def _embedded_result(text: str) -> str | None:
    return extract_answer(text) or stated_result(text)
