"""One step of GRPO (arXiv 2402.03300) with rollouts that think in parallel.

    problems -> traces -> judged -> rewards -> advantages -> rows -> updates -> metrics

Every sampled token is trained under the layout of the mode that it was rolled out in, so that the engine's
log-probs and the trainer's are the same numbers; the step measures that they are.

Departs from the paper: the ratio's denominator is the trainer's own log-prob at the start of the step. A step
with one update has just that log-prob at hand and needs no pass of its own for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megatron_parallel_r1.data.encode import encode_prompt
from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.rewards.base import Judged, Reward
from megatron_parallel_r1.rewards.verifier import Verifier
from megatron_parallel_r1.rollout.thinking import Thinker, roll_out
from megatron_parallel_r1.thought.layout import lay_out
from megatron_parallel_r1.thought.packing import pack
from megatron_parallel_r1.thought.trace import Trace
from megatron_parallel_r1.train.advantage import group_advantages
from megatron_parallel_r1.train.losses import Clip, grpo_loss
from megatron_parallel_r1.train.microbatch import MicroBatch
from megatron_parallel_r1.train.mismatch import mismatch
from megatron_parallel_r1.train.scoring import judge_traces, trace_metrics
from megatron_parallel_r1.train.trainer import Trainer, Update

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class GrpoSettings:
    """Settings of a step; see `config.RlStage`."""

    samples: int
    clip: Clip
    epochs: int = 1
    mini_batches: int = 1
    micro_tokens: int = 4096
    concurrent: int = 512


@dataclass(frozen=True, slots=True)
class Rollouts:
    """What a step rolled out, G traces of each problem in turn."""

    problems: list[Problem]
    traces: list[Trace]
    judged: list[Judged]
    rewards: list[float]


@dataclass(frozen=True, slots=True)
class Grpo:
    """What every step uses.

    Attributes:
        template: of the prompt.
        reward: a pure function of a judged trace and the step, counted from 0.
    """

    trainer: Trainer
    thinker: Thinker[Any]
    tokenizer: PreTrainedTokenizerBase
    verifier: Verifier
    reward: Reward
    template: str
    settings: GrpoSettings

    def step(
        self, problems: Sequence[Problem], step: int, seed: int, lr: float
    ) -> tuple[dict[str, Any], Rollouts]:
        """Rolls out, learns, and measures; the engine must hold the trainer's weights.

        Args:
            step: of the stage, from 1.
            seed: fixes all draws of this step.
        """
        began = time.monotonic()
        rollouts = self._roll_out(problems, step, seed)
        rolled_out = time.monotonic()
        advantages = group_advantages(np.reshape(rollouts.rewards, (len(problems), -1))).ravel()
        updates, first_pass = self._learn(rollouts.traces, advantages, lr)
        metrics = {
            "reward": float(np.mean(rollouts.rewards)),
            "reward_term": self.reward.term(step - 1),
            **trace_metrics(rollouts.traces, rollouts.judged),
            **first_pass,
            "loss": float(np.mean([update.loss for update in updates])),
            "grad_norm": float(np.mean([update.grad_norm for update in updates])),
            "clip_fraction": float(np.mean([update.means["clipped"] for update in updates])),
            "entropy": updates[0].entropy,
            "lr": lr,
            "tokens": sum(len(trace.tokens) for trace in rollouts.traces),
            "time_rollout_s": rolled_out - began,
            "time_train_s": time.monotonic() - rolled_out,
        }
        return metrics, rollouts

    def _roll_out(self, problems: Sequence[Problem], step: int, seed: int) -> Rollouts:
        each = [problem for problem in problems for _ in range(self.settings.samples)]
        prompts = [encode_prompt(self.tokenizer, self.template, problem.prompt) for problem in each]
        seeds = np.random.SeedSequence([seed, step]).generate_state(len(each), np.uint64) >> np.uint64(1)
        traces = asyncio.run(roll_out(self.thinker, prompts, seeds.tolist(), self.settings.concurrent))
        judged = judge_traces(traces, each, self.tokenizer, self.verifier)
        return Rollouts(each, traces, judged, [self.reward(j, step - 1) for j in judged])

    def _learn(
        self, traces: Sequence[Trace], advantages: np.ndarray, lr: float
    ) -> tuple[list[Update], dict[str, float]]:
        """All updates of the step, and how far engine and trainer were apart before the first."""
        settings = self.settings
        mode = self.thinker.settings.mode
        rows = [lay_out(t.prompt, t.tokens, t.sampled, t.tree, mode) for t in traces]
        values = {
            "advantage": [
                [advantage] * len(t.tokens) for t, advantage in zip(traces, advantages, strict=True)
            ],
            "engine": [t.logprobs for t in traces],
        }
        barred = [t.barred for t in traces]
        # Groups stay whole, so that each mini-batch has advantages that balance.
        groups = np.array_split(np.arange(len(traces)).reshape(-1, settings.samples), settings.mini_batches)
        packed = [pack(rows, settings.micro_tokens, group.ravel().tolist()) for group in groups]
        batches = [
            [
                MicroBatch.of(row, self.trainer.device, values, barred, self.thinker.tags.parallel)
                for row in mini_batch
            ]
            for mini_batch in packed
        ]
        alone = settings.epochs * settings.mini_batches == 1
        if not alone:
            for mini_batch in batches:
                for batch, old_N in zip(mini_batch, self.trainer.logprobs(mini_batch), strict=True):
                    batch.values["old"] = old_N

        def loss(logprobs_N: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            old_N = batch.values.get("old", logprobs_N.detach())
            total, clipped = grpo_loss(logprobs_N, old_N, batch.values["advantage"], settings.clip)
            return total, {"clipped": clipped}

        updates = [
            self.trainer.update(mini_batch, loss, lr)
            for _ in range(settings.epochs)
            for mini_batch in batches
        ]
        everything = [batch for mini_batch in batches for batch in mini_batch]
        old = updates[0].logprobs if alone else [batch.values["old"] for batch in everything]
        apart = mismatch(torch.cat(old), torch.cat([batch.values["engine"] for batch in everything]))
        return updates, {
            "mismatch_max": apart.max,
            "mismatch_mean": apart.mean,
            "mismatch_k3": apart.k3,
        }
