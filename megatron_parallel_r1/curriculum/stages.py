"""One stage from its first step, or from where it stopped, to its last."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from megatron_parallel_r1 import config
from megatron_parallel_r1.curriculum.sources import example_rows, problem_stream
from megatron_parallel_r1.curriculum.viewing import trace_record
from megatron_parallel_r1.curriculum.workbench import Workbench, native_engine
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.model.weights import hf_tensors
from megatron_parallel_r1.report.jsonl import JsonLines
from megatron_parallel_r1.report.metrics import MetricsWriter
from megatron_parallel_r1.report.progress import StageProgress
from megatron_parallel_r1.rewards.registry import make_reward
from megatron_parallel_r1.rewards.verifier import Verifier
from megatron_parallel_r1.rollout.thinking import Thinker
from megatron_parallel_r1.train.checkpoint import Checkpoints
from megatron_parallel_r1.train.grpo import Grpo, GrpoSettings, Rollouts
from megatron_parallel_r1.train.losses import Clip
from megatron_parallel_r1.train.sft import example_row, sft_step
from megatron_parallel_r1.train.trainer import Schedule, Trainer


def run_sft(bench: Workbench, stage: config.SftStage) -> Trainer:
    """Trains a supervised stage and returns its trainer."""
    recipe, folder = bench.recipe, bench.stage_folder(stage.name)
    mode = recipe.thinking_of(stage).mode
    to_row = partial(
        example_row, tokenizer=bench.tokenizer, tags=bench.tags, template=recipe.prompt, mode=mode
    )
    stream = example_rows(stage.data, bench.seed_of(stage.name, "data"), to_row)
    trainer = bench.trainer(stage)
    checkpoints = Checkpoints(folder / "checkpoints")
    done, state = checkpoints.restore(trainer)
    stream.restore(state.get("stream", stream.state()))
    schedule = _schedule(stage)
    with (
        MetricsWriter(folder, resume_step=done) as metrics,
        StageProgress(stage.name, stage.steps, done=done) as progress,
    ):
        for step in range(done + 1, stage.steps + 1):
            began = time.monotonic()
            lr = schedule.at(step, stage.steps)
            rows = stream.next_batch(stage.batch)
            with _named(stage, step):
                update = sft_step(trainer, rows, recipe.micro_tokens, lr)
            record = _heading(stage, step) | {
                "loss": update.loss,
                "grad_norm": update.grad_norm,
                "entropy": update.entropy,
                "lr": lr,
                "tokens": sum(len(row) for row in rows),
                "time_s": time.monotonic() - began,
            }
            metrics.write(record)
            progress.update(step, record)
            if step % stage.save_every == 0 and step < stage.steps:
                checkpoints.save(trainer, step, {"stream": stream.state()})
    return trainer


def run_rl(bench: Workbench, stage: config.RlStage, verifier: Verifier) -> Trainer:
    """Trains a reinforcement-learning stage and returns its trainer."""
    recipe, folder = bench.recipe, bench.stage_folder(stage.name)
    stream = problem_stream(stage.data, bench.seed_of(stage.name, "data"))
    trainer = bench.trainer(stage)
    engine = native_engine(bench.shape)
    grpo = Grpo(
        trainer=trainer,
        thinker=Thinker(engine, bench.tags, recipe.thinking_of(stage)),
        tokenizer=bench.tokenizer,
        verifier=verifier,
        reward=make_reward(stage.reward.name, stage.reward.settings),
        template=recipe.prompt,
        settings=GrpoSettings(
            samples=stage.samples,
            clip=Clip(stage.clip_low, stage.clip_high),
            epochs=stage.epochs,
            mini_batches=stage.mini_batches,
            micro_tokens=recipe.micro_tokens,
            concurrent=stage.concurrent,
        ),
    )
    checkpoints = Checkpoints(folder / "checkpoints")
    done, state = checkpoints.restore(trainer)
    stream.restore(state.get("stream", stream.state()))
    schedule, seed = _schedule(stage), bench.seed_of(stage.name, "rollout")
    with (
        MetricsWriter(folder, resume_step=done) as metrics,
        JsonLines(folder / "traces.jsonl", through=done) as kept,
        StageProgress(stage.name, stage.steps, done=done) as progress,
    ):
        for step in range(done + 1, stage.steps + 1):
            engine.load_weights(hf_tensors(trainer.model), version=step - 1)
            problems = stream.next_batch(stage.prompts)
            with _named(stage, step):
                measured, rollouts = grpo.step(problems, step, seed, schedule.at(step, stage.steps))
            record = _heading(stage, step) | measured
            metrics.write(record)
            for line in _kept(bench, rollouts, stage.keep_traces):
                kept.write({"stage": stage.name, "step": step, **line})
            progress.update(step, record)
            if step % stage.save_every == 0 and step < stage.steps:
                checkpoints.save(trainer, step, {"stream": stream.state()})
    return trainer


@contextmanager
def _named(stage: config.Stage, step: int) -> Iterator[None]:
    """Ends a run whose numbers are no longer finite, with the place and the way out."""
    try:
        yield
    except FloatingPointError as error:
        raise UserError(
            f"stage {stage.name}, step {step}: {error}; lower its optimizer.lr and start anew, the last "
            "checkpoint was written before this"
        ) from None


def _heading(stage: config.SftStage | config.RlStage, step: int) -> dict[str, Any]:
    return {"stage": stage.name, "kind": stage.kind, "step": step, "steps": stage.steps}


def _schedule(stage: config.Stage) -> Schedule:
    return Schedule(stage.optimizer.lr, stage.optimizer.warmup, stage.optimizer.final)


def _kept(bench: Workbench, rollouts: Rollouts, count: int) -> Sequence[dict[str, Any]]:
    """Traces of different problems, right and wrong ones in turn where the step has both."""
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
