"""One stage from its first step, or from where it stopped, to its last."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch.distributed as dist

from megatron_parallel_r1.config.data import DataSet
from megatron_parallel_r1.config.stages import RlStage, SftStage
from megatron_parallel_r1.data.embedded.traces import stated_result
from megatron_parallel_r1.data.prompts import encode_prompt
from megatron_parallel_r1.data.row_cache import RowCache, tokenizer_hash
from megatron_parallel_r1.distributed.replicas import background_groups
from megatron_parallel_r1.distributed.watchdog import Watchdog
from megatron_parallel_r1.model.weights import hf_tensors
from megatron_parallel_r1.report.trace_record import trace_record
from megatron_parallel_r1.rewards.extract import extract_answer
from megatron_parallel_r1.rewards.verifier import Verifier
from megatron_parallel_r1.rl.learner import Learner, Schooling
from megatron_parallel_r1.rl.metrics import without_stale
from megatron_parallel_r1.rl.path_metrics import stated_value
from megatron_parallel_r1.rl.rollout_batch import Collected, Rollouts
from megatron_parallel_r1.rl.rollout_queue import batches
from megatron_parallel_r1.rl.rollout_worker import Grpo
from megatron_parallel_r1.rollout.engine import Engine
from megatron_parallel_r1.rollout.thinking import Thinker
from megatron_parallel_r1.run.context import Workbench
from megatron_parallel_r1.run.datasets import example_rows, problem_stream
from megatron_parallel_r1.run.engines import Decoders
from megatron_parallel_r1.run.save import renew_reference
from megatron_parallel_r1.run.stage_loop import StageLoop
from megatron_parallel_r1.thought.layout import Row
from megatron_parallel_r1.train.sft import example_row, sft_step
from megatron_parallel_r1.train.trainer import Trainer
from megatron_parallel_r1.utils.rank import is_rank_zero


def run_sft(bench: Workbench, stage: SftStage, watchdog: Watchdog) -> Trainer:
    """Trains a supervised stage and returns its trainer."""
    recipe = bench.recipe
    mode = recipe.thinking_of(stage).mode
    to_row = partial(
        example_row, tokenizer=bench.tokenizer, tags=bench.tags, template=recipe.prompt_template, mode=mode
    )
    cache = RowCache(recipe.out / ".rows", tokenizer_hash(bench.tokenizer), recipe.prompt_template, mode)
    stream = example_rows(recipe, stage, bench.seed_of(stage.name, "data"), to_row, cache)
    trainer = bench.trainer(stage)
    with StageLoop(bench, stage, trainer, stream, watchdog) as loop:
        for step, lr in loop:
            began = time.monotonic()
            rows = stream.next_batch(stage.examples_per_step)
            learned = loop.guard.learn(
                step,
                partial(_learn_sft, trainer, rows, recipe.max_tokens_per_micro_batch, lr),
                partial(_rows_kept, rows),
            )
            tokens = sum(len(row) for row in rows)
            loop.end(step, learned | {"lr": lr, "tokens": tokens, "time_s": time.monotonic() - began})
    return trainer


def run_rl(
    bench: Workbench, stage: RlStage, verifier: Verifier, decoders: Decoders, watchdog: Watchdog
) -> Trainer:
    """Trains a reinforcement-learning stage and returns its trainer."""
    stream = problem_stream(
        bench.recipe,
        stage,
        bench.seed_of(stage.name, "data"),
        lambda problem: len(encode_prompt(bench.tokenizer, bench.recipe.prompt_template, problem.prompt)),
    )
    seed = bench.seed_of(stage.name, "rollout")
    trainer = bench.trainer(stage)
    patience = bench.recipe.collective_timeout_s
    groups = background_groups(patience) if stage.max_off_policy_steps else nullcontext((None, None))
    with (
        groups as (team, world),
        StageLoop(bench, stage, trainer, stream, watchdog) as loop,
        decoders.of(trainer.model, bench.recipe.thinking_of(stage), team) as decoder,
    ):
        grpo = _grpo(bench, stage, trainer, decoder.engine, verifier, world, loop.done)
        with batches(
            lambda step: grpo.roll_out(stream.next_batch, step, seed),
            decoder.engine,
            max_staleness=stage.max_off_policy_steps,
            partial=stage.partial_rollout,
            done=loop.done,
            steps=stage.steps,
            found=loop.found,
        ) as ahead:
            loop.in_flight = ahead.in_flight
            for step, lr in loop:
                began = time.monotonic()
                with grpo.phases.of("sync"):
                    ahead.publish(hf_tensors(trainer.model), version=step - 1)
                with grpo.phases.of("wait"):
                    batch = ahead.take(step)
                collected = without_stale(batch, step, stage.max_off_policy_steps, stage.samples_per_prompt)
                rolled_out = time.monotonic()
                decoder.rest()
                learned = loop.guard.learn(
                    step, partial(grpo.learn, collected, step, lr), partial(_traces_kept, collected)
                )
                renew_reference(bench, stage, grpo.learner, step)
                times = {"time_rollout_s": rolled_out - began, "time_train_s": time.monotonic() - rolled_out}
                times |= grpo.phases.take()
                measured = grpo.measure(collected, step) | learned | {"lr": lr} | times | decoder.metrics()
                loop.end(step, measured, _shown(bench, collected.all, stage.keep_traces))
    return trainer


def _learn_sft(trainer: Trainer, rows: Sequence[Row], micro_tokens: int, lr: float) -> dict[str, float]:
    update = sft_step(trainer, rows, micro_tokens, lr)
    return {"loss": update.loss, "grad_norm": update.grad_norm, "entropy": update.entropy}


def _rows_kept(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [{"tokens": row.tokens_L.tolist(), "source": row.source_L.tolist()} for row in rows]


def _traces_kept(collected: Collected) -> list[dict[str, Any]]:
    """All that the step's updates were made of, to make them again."""
    pairs = zip(collected.kept.traces, collected.kept.rewards, strict=True)
    columns = ("prompt", "tokens", "sampled", "barred", "logprobs", "versions", "finish")
    return [{name: getattr(trace, name) for name in columns} | {"reward": reward} for trace, reward in pairs]


def _grpo(
    bench: Workbench,
    stage: RlStage,
    trainer: Trainer,
    engine: Engine[Any],
    verifier: Verifier,
    world: dist.ProcessGroup | None,
    done: int,
) -> Grpo:
    """A stage's settings as one object that makes its steps, from the one after `done` on."""
    recipe, thinking = bench.recipe, bench.recipe.thinking_of(stage)
    needs_reference = stage.objective.kl != "none"
    learner = Learner(
        trainer=trainer,
        objective=stage.objective,
        schooling=Schooling(
            stage.samples_per_prompt,
            stage.epochs,
            stage.mini_batches,
            recipe.max_tokens_per_micro_batch,
            thinking.max_response_tokens,
        ),
        mode=thinking.mode,
        tags=bench.tags,
        reference=bench.reference(stage, done) if needs_reference else None,
    )
    return Grpo(
        learner=learner,
        thinker=Thinker(engine, bench.tags, thinking),
        tokenizer=bench.tokenizer,
        verifier=verifier,
        reward=stage.reward.make(),
        template=recipe.prompt_template,
        prompts=stage.prompts_per_step,
        samples=stage.samples_per_prompt,
        dynamic=stage.dynamic_sampling,
        concurrent=stage.max_concurrent_rollouts,
        max_staleness=stage.max_off_policy_steps,
        world=world,
        stated=stated_value if isinstance(stage.data, DataSet) else _stated_embedded,
    )


def _stated_embedded(text: str) -> str | None:
    return extract_answer(text) or stated_result(text)


def _shown(bench: Workbench, rollouts: Rollouts, count: int) -> Sequence[dict[str, Any]]:
    """Traces of different problems, right and wrong ones in turn where the step has both; for the process
    that writes them."""
    if not is_rank_zero():
        return ()
    total = len(rollouts.traces)
    ranked = sorted(range(total), key=lambda i: (i * 7919 % total, i))
    right = [i for i in ranked if rollouts.judged[i].correct]
    wrong = [i for i in ranked if not rollouts.judged[i].correct]
    turns = [i for pair in zip(right, wrong, strict=False) for i in pair]
    chosen = [*turns, *right[len(wrong) :], *wrong[len(right) :]][:count]
    return [
        trace_record(
            rollouts.traces[i], rollouts.problems[i], rollouts.judged[i], rollouts.rewards[i], bench.tokenizer
        )
        for i in chosen
    ]
