"""The RL loop: prompts -> responses -> rewards -> advantages -> loss -> new weights.

GRPO (arXiv 2402.03300) and its family on responses that think in parallel (arXiv 2509.07980).

Shapes: R responses of a step, in groups that answer one prompt each.
"""

from __future__ import annotations

from functools import partial

from megatron_parallel_r1.config.stages import RlStage
from megatron_parallel_r1.distributed.collectives import background_groups
from megatron_parallel_r1.distributed.watchdog import Watchdog
from megatron_parallel_r1.model.weights import hf_tensors
from megatron_parallel_r1.rewards.verifier import Verifier
from megatron_parallel_r1.rl.learner import Learner
from megatron_parallel_r1.rl.metrics import sample_traces
from megatron_parallel_r1.rl.reference import update_reference
from megatron_parallel_r1.rl.rollout_batch import drop_stale
from megatron_parallel_r1.rl.rollout_queue import lent_engine, open_queue
from megatron_parallel_r1.rl.rollout_worker import RolloutWorker
from megatron_parallel_r1.run.backends import Backends
from megatron_parallel_r1.run.context import RunContext
from megatron_parallel_r1.run.datasets import problem_stream
from megatron_parallel_r1.run.guard import SKIPPED
from megatron_parallel_r1.run.stage_loop import Evaluator, StageLoop
from megatron_parallel_r1.train.trainer import Trainer
from megatron_parallel_r1.utils.timers import Timers


def train_rl(
    run: RunContext,
    stage: RlStage,
    verifier: Verifier,
    backends: Backends,
    watchdog: Watchdog,
    evaluator: Evaluator,
) -> Trainer:
    """Trains an RL stage and returns its trainer."""
    trainer, timers, colocated = run.trainer(stage), Timers(), run.recipe.rollout.colocated
    problems = problem_stream(run.recipe, stage, run.seed_of(stage.name, "data"), run.prompt_tokens)
    with (
        StageLoop(run, stage, trainer, watchdog, evaluator) as loop,
        trainer.memory.offloaded_around(colocated),
        background_groups(run.recipe.collective_timeout_s, stage.max_off_policy_steps > 0) as (
            tensor_group,
            world,
        ),
        backends.open(trainer.model, run.recipe.thinking_of(stage), loop.done, tensor_group) as backend,
    ):
        loop.restore("stream", problems)
        worker = RolloutWorker.of(run, stage, backend.engine, problems, verifier, timers, world)
        learner = Learner.of(run, stage, trainer, timers, loop.done)
        with (
            open_queue(worker, stage, loop.done, loop.restored("in_flight")) as rollouts,
            run.exporter.following(rollouts, backend),
        ):
            engine_at = partial(lent_engine, rollouts, backend, trainer.model)  # for evaluations
            for step, lr in loop.steps({"in_flight": rollouts, "stream": problems}, engine_at):
                with timers.of("rollout"):
                    # Colocated servers and the trainer take turns with the GPUs' memory, line by line.
                    if colocated:
                        trainer.memory.offload()  # gradients and optimizer leave the GPU
                    # Servers resume their weights, take the new ones, resume their cache.
                    rollouts.update_weights(hf_tensors(trainer.model), version=step - 1)
                    batch = rollouts.next_batch(step)  # prompts -> responses -> rewards
                    backend.sleep()  # colocated servers release all memory
                    if colocated:
                        trainer.memory.onload()
                    batch = drop_stale(batch, step, stage.max_off_policy_steps, stage.samples_per_prompt)
                with timers.of("train"):
                    metrics = SKIPPED
                    with loop.guard.skip_if_not_finite(step, batch):
                        policy_batch = learner.prepare(batch.trained.traces)  # old and reference log-probs
                        advantages_R = learner.advantages(policy_batch, batch.trained.rewards)
                        path_verdicts = worker.judge_paths(batch) if stage.objective.path_credit else None
                        # Policy loss, gradient, optimizer step, for each mini-batch.
                        metrics = learner.update(policy_batch, advantages_R, lr, path_verdicts)
                    update_reference(run, stage, learner.reference, trainer.model, step)
                rollout_metrics = worker.metrics(batch, step)
                metrics = rollout_metrics | metrics | {"lr": lr} | timers.take() | backend.metrics()
                shown = sample_traces(batch.all, stage.keep_traces, run.tokenizer)
                loop.end(step, metrics, shown, batch.histograms)
    return trainer
