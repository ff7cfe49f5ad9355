"""Time breakdown of a GRPO step, the gain by asynchronous rollouts, and how the cost scales.

    python -m benchmarks.rl_step [--repeats 5] [--write]

Steps of the demo's model on its problems with the parts of a real stage: native engine, verifier, trainer,
weight updates. Traces have a fixed size (benchmarks/paced.py); the verifier gives the rewards.

1. Shares of a step, synchronous and asynchronous (`max_off_policy_steps` 1), in one process.
2. Cost as one size grows and the others stay: CPU seconds of a step, and the slope of a log-log fit. 1 is
   linear; attention's own part grows with the square of a row's length.
3. The same for a growing number of data-parallel processes with equally many traces each: total CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.paced import Pace, Paced
from benchmarks.page import Table, add_write_option, publish
from benchmarks.side_by_side import ratios, spread
from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.config.objective import Objective
from megatron_parallel_r1.config.stages import RlStage
from megatron_parallel_r1.data.embedded.generate import build_tokenizer, training_problem
from megatron_parallel_r1.data.embedded.traces import stated_result
from megatron_parallel_r1.data.sampler import ProblemStream
from megatron_parallel_r1.distributed import process
from megatron_parallel_r1.distributed.collectives import background_groups
from megatron_parallel_r1.model.gpt import build_model
from megatron_parallel_r1.model.weights import hf_tensors, load_hf_tensors, random_hf_tensors
from megatron_parallel_r1.rewards.registry import make_reward
from megatron_parallel_r1.rewards.verifier import Verifier
from megatron_parallel_r1.rl.learner import BatchConfig, Learner
from megatron_parallel_r1.rl.rollout_queue import open_queue
from megatron_parallel_r1.rl.rollout_worker import RolloutWorker
from megatron_parallel_r1.rollout.native.engine import NativeEngine
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.rollout.thinking import Thinker
from megatron_parallel_r1.thought.tokenizer import add_tags
from megatron_parallel_r1.train.trainer import Adam, Trainer
from megatron_parallel_r1.utils.timers import Timers

ROOT = Path(__file__).resolve().parents[1]
PHASES = ("sync", "draw", "verify", "logprobs", "update")
SAMPLES = 8
PATIENCE_S = 600.0
PACE = Pace(main=12, path=16, summary=12)


@dataclass(frozen=True, slots=True)
class Size:
    """Size of a step in one process.

    Attributes:
        prompts: prompts with SAMPLES traces each.
        paths: paths of the one block in each trace.
    """

    prompts: int = 12
    paths: int = 4
    pace: Pace = PACE

    @property
    def tokens(self) -> int:
        """Tokens of a trace."""
        return self.pace.trace(self.paths)


@dataclass(frozen=True, slots=True)
class Step:
    """Wall-clock seconds, CPU seconds, and seconds per phase of a step."""

    wall: float
    processor: float
    phases: dict[str, float]


SWEEPS = {
    "traces": [(SAMPLES * n, Size(prompts=n)) for n in (4, 8, 16, 32)],
    "length": [(size.tokens, size) for size in (Size(6, 4, Pace(8 * n, 8 * n, 8 * n)) for n in (1, 2, 4, 8))],
    "paths": [(size.tokens, size) for size in (Size(paths=n) for n in (1, 2, 4, 8))],
}
RANKS = (1, 2, 4)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="steps per measurement")
    parser.add_argument("--as-rank", type=Path, help=argparse.SUPPRESS)  # started by itself under torchrun
    add_write_option(parser)
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    if args.as_rank:
        with process.running(seed=1):
            step = typical(steps(Size(prompts=4 * dist.get_world_size()), args.repeats))
            (args.as_rank / f"{dist.get_rank()}.json").write_text(json.dumps(step.processor))
        return
    with process.running(seed=1):
        tables = [shares(args.repeats), growth(args.repeats)]
    publish("rl step", [*tables, ranks(args.repeats)], f"{os.cpu_count()} CPU cores", args.write)


def shares(repeats: int, size: Size = Size()) -> Table:
    """Shares of a step's time, synchronous and asynchronous."""
    rows, walls = [], []
    for name, staleness in (("synchronous", 0), ("asynchronous", 1)):
        measured = steps(size, repeats, staleness)
        walls.append([step.wall for step in measured])
        spent = {phase: sum(step.phases.get(phase, 0.0) for step in measured) for phase in (*PHASES, "wait")}
        idle = spent["wait"] - (0.0 if staleness else spent["draw"] + spent["verify"])
        parts = [*(spent[phase] for phase in PHASES), idle]
        rows.append((name, spread(walls[-1]), *(f"{part / sum(walls[-1]):.0%}" for part in parts)))
    columns = ("rollout", "step s", "sync", "draw", "verify", "log-probs", "update", "idle")
    saved = spread(ratios(walls[0], walls[1]))
    note = (
        f"{size.prompts * SAMPLES} traces of {size.tokens} tokens, two updates. Asynchronous rollouts "
        "sample and verify in a second thread, so the shares add up to more than the step; idle is the time "
        f"that the training thread waits. A synchronous step takes {saved} times as long; measured one "
        "after the other."
    )
    return Table("Where the time of an RL step goes", columns, rows, note)


def growth(repeats: int) -> Table:
    """Scaling exponents of a step's cost."""
    rows = []
    for name, sizes in SWEEPS.items():
        measured = [typical(steps(size, repeats)) for _, size in sizes]
        amounts = [amount for amount, _ in sizes]
        costs = [[step.processor for step in measured]]
        costs += [[step.phases.get(phase, 0.0) for step in measured] for phase in ("draw", "update")]
        seconds = ", ".join(f"{step.processor:.2f}" for step in measured)
        exponents = (f"{exponent(amounts, values):.2f}" for values in costs)
        rows.append((name, ", ".join(map(str, amounts)), seconds, *exponents))
    columns = ("size", "values", "CPU s per step", "exponent", "of sampling", "of the updates")
    return Table("Scaling of an RL step's cost (length and paths: tokens of a trace)", columns, rows)


def ranks(repeats: int) -> Table:
    """Total CPU seconds of a growing number of processes, each with equally many traces."""
    totals = [sum(_under_torchrun(count, repeats)) for count in RANKS]
    seconds = ", ".join(f"{total:.2f}" for total in totals)
    row = (", ".join(map(str, RANKS)), seconds, f"{exponent(RANKS, totals):.2f}")
    return Table(
        "Scaling with data-parallel processes, 32 traces each",
        ("processes", "CPU s per step, all processes", "exponent"),
        [row],
    )


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Slope of the log-log fit."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def typical(measured: Sequence[Step]) -> Step:
    """The step with the median CPU time."""
    return sorted(measured, key=lambda step: step.processor)[len(measured) // 2]


def steps(size: Size, count: int, staleness: int = 0) -> list[Step]:
    """Measures `count` steps after one warm-up step; runs them as rl/loop.py does."""
    measured: list[Step] = []
    with (
        background_groups(PATIENCE_S, enabled=staleness > 0) as (_, world),
        _stage(size, count + 1, world, staleness) as (worker, learner),
    ):
        timers, model = worker.timers, learner.trainer.model
        with open_queue(worker, worker.stage, done=0, pending=None) as rollouts:
            for step in range(1, count + 2):
                began, worked = time.perf_counter(), time.process_time()
                rollouts.update_weights(hf_tensors(model), version=step - 1)
                batch = rollouts.next_batch(step)
                policy_batch = learner.prepare(batch.trained.traces)
                advantages_R = learner.advantages(policy_batch, batch.trained.rewards)
                learner.update(policy_batch, advantages_R, lr=1e-5)
                phases = {name[5:-2]: seconds for name, seconds in {**batch.times, **timers.take()}.items()}
                lengths = {outline.length for outline in batch.all.outlines}
                assert lengths == {size.tokens}, lengths
                measured.append(Step(time.perf_counter() - began, time.process_time() - worked, phases))
    return measured[1:]


@contextmanager
def _stage(
    size: Size, steps: int, world: dist.ProcessGroup | None, staleness: int
) -> Iterator[tuple[RolloutWorker, Learner]]:
    """The demo's model and GRPO with two mini-batches."""
    tokenizer = build_tokenizer()
    tags = add_tags(tokenizer)
    shape = ModelConfig(128, 2, 4, 2, 32, 512, vocab=len(tokenizer), rope_theta=1e3, max_positions=2048)
    model = build_model(shape)
    load_hf_tensors(model, random_hf_tensors(shape, seed=0, std=0.08))
    thinking = Thinking(paths=size.paths, max_blocks=1, max_path_tokens=512, max_response_tokens=2000)
    batch = BatchConfig(SAMPLES, epochs=1, mini_batches=2, micro_tokens=2048, max_response_tokens=2000)
    timers = Timers()
    trainer = Trainer(model, Adam(lr=1e-5))
    learner = Learner(trainer, Objective(), batch, "isolated", tags, timers=timers)
    engine = Paced(NativeEngine(shape), tags, size.pace)
    stage = RlStage(
        name="rl",
        kind="rl",
        data={"source": "embedded", "kind": "easy"},
        steps=steps,
        prompts_per_step=size.prompts,
        samples_per_prompt=SAMPLES,
        max_concurrent_rollouts=256,
        max_off_policy_steps=staleness,
        optimizer={"lr": 1e-5},
    )
    with Verifier() as verifier:
        worker = RolloutWorker(
            stage,
            ProblemStream(partial(training_problem, "easy", 5), seed=0),
            Thinker(engine, tags, thinking),
            tokenizer,
            verifier,
            seed=1,
            reward=make_reward("accuracy"),
            template="plain",
            read_result=stated_result,
            timers=timers,
            folder=Path(),
            world=world,
        )
        yield worker, learner


def _under_torchrun(count: int, repeats: int) -> list[float]:
    """CPU seconds of a step on each of `count` processes."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        words += ["-m", "benchmarks.rl_step", "--as-rank", folder, "--repeats", str(repeats)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-W", "ignore", *words], cwd=ROOT, env=environment, check=True)
        return [json.loads(file.read_text()) for file in sorted(Path(folder).iterdir())]


if __name__ == "__main__":
    main()
