"""Time error of `parallel-r1 plan`, and its predictions for large runs.

    python -m benchmarks.plan_error [--repeats 3] [--tokens 48] [--write]

1. Measured here: optimizer steps and rollouts of small models in one process and one thread. The machine's
   rates are fitted to some of them (least squares of relative errors) and predict the others.
2. Published: H100 runs (benchmarks/published_runs.py); two rates are calibrated on two of them and predict
   the others.
3. Predicted: steps of the published recipe for larger models on 8 to 1024 H100s, with those rates. None of
   these has been run.

tests/planning/test_memory.py checks a plan's memory to the byte.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks.page import Table, add_write_option, publish
from benchmarks.published_runs import CALIBRATED_ON, HELD_OUT, calibrated, overlapping
from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.config.reader import read_recipe
from megatron_parallel_r1.distributed import process
from megatron_parallel_r1.distributed.parallel_config import ParallelConfig
from megatron_parallel_r1.model.gpt import build_model
from megatron_parallel_r1.model.weights import load_hf_tensors, random_hf_tensors
from megatron_parallel_r1.planning.machine import H100, Cost, Machine
from megatron_parallel_r1.planning.memory import pipeline_parts
from megatron_parallel_r1.planning.plan import GIB, plan
from megatron_parallel_r1.planning.rollouts import pass_cost
from megatron_parallel_r1.planning.training import MicroBatches, Split, update_cost
from megatron_parallel_r1.rollout.engine import Sampling
from megatron_parallel_r1.rollout.native.engine import NativeEngine
from megatron_parallel_r1.sft.loop import sft_step
from megatron_parallel_r1.thought.layout import Row, lay_out
from megatron_parallel_r1.thought.tree import Tree
from megatron_parallel_r1.train.trainer import Adam, Trainer

ROOT = Path(__file__).resolve().parents[1]
FLOAT32 = 4
# Kinds of work whose rates are fitted; a single process has no communication, and no experts here.
FITTED = ("products", "attention", "stream", "layers", "passes", "updates")


@dataclass(frozen=True, slots=True)
class Case:
    """A measurement in one process: an update on `rows` rows of `length` tokens, or decoding of `rows` texts
    with prompts of `length` tokens."""

    kind: str
    hidden: int
    layers: int
    rows: int
    length: int
    held_out: bool = False

    @property
    def shape(self) -> ModelConfig:
        heads = self.hidden // 32
        return ModelConfig(self.hidden, self.layers, heads, heads // 2, 32, 3 * self.hidden, vocab=4096)

    @property
    def split(self) -> Split:
        return Split(self.shape, ParallelConfig(), data=1, number=FLOAT32, per_node=1)


CASES = (
    Case("update", 128, 2, 1, 512),
    Case("update", 128, 4, 2, 1024),
    Case("update", 256, 4, 1, 2048),
    Case("update", 256, 2, 2, 512),
    Case("update", 384, 4, 1, 512),
    Case("update", 256, 4, 2, 1024, held_out=True),
    Case("update", 384, 2, 1, 2048, held_out=True),
    Case("update", 128, 4, 4, 512, held_out=True),
    Case("draws", 128, 2, 16, 64),
    Case("draws", 128, 4, 64, 64),
    Case("draws", 256, 4, 16, 256),
    Case("draws", 256, 2, 128, 64),
    Case("draws", 256, 4, 64, 128, held_out=True),
    Case("draws", 128, 4, 128, 256, held_out=True),
)
LARGE = {
    "Qwen3-4B-Base": "parallel.tensor=2",
    "Qwen3-32B": "parallel.tensor=8 parallel.recompute=full",
    "Qwen3-30B-A3B-Base": "parallel.tensor=4 parallel.recompute=full",
}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="repeats per measurement; the median counts")
    parser.add_argument("--tokens", type=int, default=48, help="new tokens per text of a rollout")
    add_write_option(parser)
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    with process.running(seed=1):
        here = measured_here(args.repeats, args.tokens)
    publish("plan", [here, published(), *predicted()], "one CPU thread for what is measured here", args.write)


def measured_here(repeats: int, tokens: int, cases: Sequence[Case] = CASES) -> Table:
    """Fits rates to the cases that are not held out; tabulates the error of every case."""
    costs = [cost_of(case, tokens) for case in cases]
    seconds = [seconds_of(case, repeats, tokens) for case in cases]
    machine = fit(
        [(cost, taken) for case, cost, taken in zip(cases, costs, seconds, strict=True) if not case.held_out]
    )
    rows, errors = [], []
    for case, cost, taken in zip(cases, costs, seconds, strict=True):
        prediction = machine.seconds(cost)
        errors.append(abs(prediction / taken - 1))
        work = f"{case.rows} x {case.length}" + (f" + {tokens}" if case.kind == "draws" else "")
        cells = (case.kind, f"{case.layers} x {case.hidden}", work, f"{taken:.3f}", f"{prediction:.3f}")
        rows.append((*cells, f"{prediction / taken - 1:+.0%}", "held out" if case.held_out else "fitted"))
    held_out = [error for case, error in zip(cases, errors, strict=True) if case.held_out]
    return Table(
        "Steps and rollouts on this machine, predicted with rates fitted to a part of them",
        ("work", "layers x hidden", "rows x tokens", "measured s", "predicted s", "error", ""),
        rows,
        f"Held out: median error {median(held_out):.0%}, largest {max(held_out):.0%}.",
    )


def cost_of(case: Case, tokens: int) -> Cost:
    if case.kind == "update":
        (part,) = pipeline_parts(case.shape, ParallelConfig())
        rows = MicroBatches(case.rows, case.length, case.length / 2, case.length - 1)
        return update_cost(case.split, rows, part.elements)
    return tokens * pass_cost(case.split, case.rows, case.length + tokens / 2)


def seconds_of(case: Case, repeats: int, tokens: int) -> float:
    if case.kind == "update":
        return _update_seconds(case, repeats)
    engine = NativeEngine(case.shape)
    engine.load_weights(random_hf_tensors(case.shape, seed=0, std=0.02), version=0)
    taken = [asyncio.run(_draw_seconds(engine, case, tokens)) for _ in range(repeats + 1)]
    return median(taken[1:])


def _update_seconds(case: Case, repeats: int) -> float:
    model = build_model(case.shape)
    load_hf_tensors(model, random_hf_tensors(case.shape, seed=0, std=0.02))
    trainer = Trainer(model, Adam(lr=1e-5))
    rows = [plain_row(case, seed) for seed in range(case.rows)]

    def once() -> float:
        began = time.perf_counter()
        sft_step(trainer, rows, case.length, 1e-5)
        return time.perf_counter() - began

    return median([once() for _ in range(repeats + 1)][1:])


def plain_row(case: Case, seed: int) -> Row:
    """A text without blocks; all tokens but the first carry loss."""
    words = np.random.default_rng(seed).integers(10, case.shape.vocab, case.length).tolist()
    return lay_out(words[:1], words[1:], [True] * (case.length - 1), Tree(case.length - 1), "sequential")


async def _draw_seconds(engine: NativeEngine, case: Case, tokens: int) -> float:
    """Seconds to decode `tokens` tokens per text after the prefill; the texts share no prompt."""
    contexts = [engine.open() for _ in range(case.rows)]
    words = np.random.default_rng(0).integers(10, case.shape.vocab, (case.rows, case.length)).tolist()
    await asyncio.gather(*map(engine.write, contexts, words))
    no_tokens: frozenset[int] = frozenset()
    began = time.perf_counter()
    grow = partial(engine.sample, limit=tokens, stop=no_tokens, suppress=no_tokens)
    await asyncio.gather(*(grow(context, Sampling(seed=seed)) for seed, context in enumerate(contexts)))
    seconds = time.perf_counter() - began
    for context in contexts:
        engine.close(context)
    return seconds


def fit(runs: Sequence[tuple[Cost, float]]) -> Machine:
    """Fits seconds per unit of each kind: non-negative least squares of the relative errors."""
    amounts = np.array([[getattr(cost, kind) for kind in FITTED] for cost, _ in runs])
    seconds = np.array([taken for _, taken in runs])
    relative = amounts / seconds[:, None]
    scale = relative.max(0)
    scale[scale == 0] = 1.0
    free = list(range(len(FITTED)))
    while True:
        solution = np.linalg.lstsq(relative[:, free] / scale[free], np.ones(len(runs)), rcond=None)[0]
        if (solution >= 0).all():
            break
        free.remove(free[int(solution.argmin())])
    units = dict.fromkeys(FITTED, 0.0) | {
        FITTED[i]: x / scale[i] for i, x in zip(free, solution, strict=True)
    }

    def rate(kind: str) -> float:
        return 1 / units[kind] if units[kind] else 1e30

    return Machine(
        name="this machine",
        per_node=1,
        products=rate("products"),
        experts=rate("products"),
        attention=rate("attention"),
        stream=rate("stream"),
        node=1e30,
        net=1e30,
        layer=units["layers"],
        decoding_layer=units["passes"],
        update=units["updates"],
    )


def published() -> Table:
    """Errors for H100 runs that NVIDIA published; two of them calibrate the rates."""
    machine = overlapping(H100)
    for kind in CALIBRATED_ON:
        machine = machine.replace(**{kind: calibrated(kind, machine)})
    rows = []
    for run in (*CALIBRATED_ON.values(), *HELD_OUT):
        prediction = machine.seconds(run.cost(machine), fp8=True)
        split = run.parallel
        layout = f"TP{split.tensor} PP{split.pipeline} CP{split.context} DP{run.data}"
        error = "calibrated" if run in CALIBRATED_ON.values() else f"{prediction / run.seconds - 1:+.0%}"
        rows.append((run.name, f"{run.gpus}", layout, f"{run.seconds:.2f}", f"{prediction:.2f}", error))
    peak = 989e12
    note = (
        f"Matrix products reach {machine.products / peak:.1%} of the peak, experts' "
        f"{machine.experts / peak:.1%}. The previous release published twice the speed for Qwen3 30B-A3B, "
        "with token dropping: predictions for experts are accurate to a factor of two."
    )
    return Table(
        "Published pre-training steps on H100s (FP8)",
        ("model", "GPUs", "layout", "published s", "predicted s", "error"),
        rows,
        note,
    )


def predicted() -> Iterator[Table]:
    """Steps of the recipe's RL on DAPO problems for larger models, and memory of the fullest GPU."""
    rows = []
    for name, overrides in LARGE.items():
        for gpus in (8, 64, 256, 1024):
            recipe = read_recipe(
                ROOT / "recipes/qwen3_4b/curriculum.yaml", [f"model.path=Qwen/{name}", *overrides.split()]
            )
            stage = plan(recipe, gpus).stages[-1]
            memory = stage.memories[stage.fullest].total / GIB
            time = stage.time
            seconds = (time.rollout, time.logprobs, time.update, time.total)
            over = " (does not fit)" if memory > 80 else ""
            rows.append((name, str(gpus), *(f"{x:.0f}" for x in seconds), f"{memory:.0f}{over}"))
    yield Table(
        "Predicted: 2,048 traces per step, all of full length, bfloat16 on H100s",
        ("model", "GPUs", "rollout s", "log-probs s", "update s", "step s", "GiB per GPU"),
        rows,
        "`parallel-r1 plan RECIPE --gpus N` predicts any recipe, stage by stage.",
    )


if __name__ == "__main__":
    main()
