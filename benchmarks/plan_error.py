"""How far off `parallel-r1 plan` is in time, and what it says of large runs.

    python -m benchmarks.plan_error [--repeats 3] [--tokens 48] [--write]

1. Measured here: optimizer steps and rollouts of small models in one process and one thread. The machine's
   rates are fitted to some of them (least squares of relative errors) and predict the others.
2. Published: H100 runs (benchmarks/published_runs.py); two rates are calibrated on two of them, and predict
   the others.
3. Predicted: steps of the published recipe for larger models on 8 to 1024 H100s, by those rates. Nobody has
   run these.

What a plan says of memory is checked to the byte by tests/planning/test_memory.py.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
from megatron_parallel_r1.model.optimizer import Adam
from megatron_parallel_r1.model.weights import load_hf_tensors, random_hf_tensors
from megatron_parallel_r1.planning.machine import H100, Cost, Machine
from megatron_parallel_r1.planning.plan import GIB, plan
from megatron_parallel_r1.planning.rollouts import pass_cost
from megatron_parallel_r1.planning.split import pipeline_parts
from megatron_parallel_r1.planning.training import MicroBatches, Split, update_cost
from megatron_parallel_r1.rollout.engine import Sampling
from megatron_parallel_r1.rollout.native.engine import NativeEngine
from megatron_parallel_r1.rollout.native.model import Architecture
from megatron_parallel_r1.sft.loop import sft_step
from megatron_parallel_r1.thought.layout import Row, lay_out
from megatron_parallel_r1.thought.tree import Tree
from megatron_parallel_r1.train.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
FLOAT32 = 4
# Rates of these kinds are fitted; a single process sends nothing and has no experts here.
FITTED = ("products", "attention", "stream", "layers", "passes", "updates")


@dataclass(frozen=True, slots=True)
class Case:
    """One measured run of one process: an update of so many rows of so many tokens, or draws of `rows` texts
    with a prompt of `length`."""

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
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement; the median counts")
    parser.add_argument("--tokens", type=int, default=48, help="that each text of a rollout grows by")
    add_write_option(parser)
    told = parser.parse_args(words)
    torch.set_num_threads(1)
    with process.running(seed=1):
        here = measured_here(told.repeats, told.tokens)
    publish("plan", [here, published(), *predicted()], "one CPU thread for what is measured here", told.write)


def measured_here(repeats: int, tokens: int, cases: Sequence[Case] = CASES) -> Table:
    """Fits rates to the cases that are not held out; the error of each."""
    costs = [cost_of(case, tokens) for case in cases]
    seconds = [seconds_of(case, repeats, tokens) for case in cases]
    machine = fit(
        [(cost, taken) for case, cost, taken in zip(cases, costs, seconds, strict=True) if not case.held_out]
    )
    rows, errors = [], []
    for case, cost, taken in zip(cases, costs, seconds, strict=True):
        said = machine.seconds(cost)
        errors.append(abs(said / taken - 1))
        work = f"{case.rows} x {case.length}" + (f" + {tokens}" if case.kind == "draws" else "")
        each = (case.kind, f"{case.layers} x {case.hidden}", work, f"{taken:.3f}", f"{said:.3f}")
        rows.append((*each, f"{said / taken - 1:+.0%}", "held out" if case.held_out else "fitted"))
    apart = [error for case, error in zip(cases, errors, strict=True) if case.held_out]
    return Table(
        "Time of steps and rollouts on this machine, predicted by rates that others were fitted to",
        ("work", "layers x hidden", "rows x tokens", "measured s", "predicted s", "error", ""),
        rows,
        f"Of those held out: median error {median(apart):.0%}, largest {max(apart):.0%}.",
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
    engine = NativeEngine(Architecture.of(case.shape))
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
    """A text without blocks, all of whose tokens but the first carry loss."""
    words = np.random.default_rng(seed).integers(10, case.shape.vocab, case.length).tolist()
    return lay_out(words[:1], words[1:], [True] * (case.length - 1), Tree(case.length - 1), "sequential")


async def _draw_seconds(engine: NativeEngine, case: Case, tokens: int) -> float:
    """In which texts that share no prompt grow by `tokens` each; their prompts were read before."""
    contexts = [engine.open() for _ in range(case.rows)]
    words = np.random.default_rng(0).integers(10, case.shape.vocab, (case.rows, case.length)).tolist()
    await asyncio.gather(*map(engine.write, contexts, words))
    none: frozenset[int] = frozenset()
    began = time.perf_counter()
    grow = partial(engine.sample, limit=tokens, stop=none, suppress=none)
    await asyncio.gather(*(grow(context, Sampling(seed=seed)) for seed, context in enumerate(contexts)))
    seconds = time.perf_counter() - began
    for context in contexts:
        engine.close(context)
    return seconds


def fit(runs: Sequence[tuple[Cost, float]]) -> Machine:
    """Seconds of a unit of each kind that minimise the squares of relative errors; none below 0."""
    amounts = np.array([[getattr(cost, kind) for kind in FITTED] for cost, _ in runs])
    seconds = np.array([taken for _, taken in runs])
    wanted = amounts / seconds[:, None]
    scale = wanted.max(0)
    scale[scale == 0] = 1.0
    free = list(range(len(FITTED)))
    while True:
        found = np.linalg.lstsq(wanted[:, free] / scale[free], np.ones(len(runs)), rcond=None)[0]
        if (found >= 0).all():
            break
        free.remove(free[int(found.argmin())])
    units = dict.fromkeys(FITTED, 0.0) | {FITTED[i]: x / scale[i] for i, x in zip(free, found, strict=True)}

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
    """Of runs on H100s that NVIDIA published, and the rates that two of them give."""
    machine = overlapping(H100)
    for kind in CALIBRATED_ON:
        machine = replace(machine, **{kind: calibrated(kind, machine)})
    rows = []
    for run in (*CALIBRATED_ON.values(), *HELD_OUT):
        said = machine.seconds(run.cost(machine), fp8=True)
        split = run.parallel
        layout = f"TP{split.tensor} PP{split.pipeline} CP{split.context} DP{run.data}"
        error = "calibrated" if run in CALIBRATED_ON.values() else f"{said / run.seconds - 1:+.0%}"
        rows.append((run.name, f"{run.gpus}", layout, f"{run.seconds:.2f}", f"{said:.2f}", error))
    peak = 989e12
    note = (
        f"Products reach {machine.products / peak:.1%} of the peak, experts' {machine.experts / peak:.1%}. "
        "The published speed of Qwen3 30B-A3B was twice as high in the release before, with tokens dropped: "
        "predictions for experts are good to a factor of two."
    )
    return Table(
        "Published pre-training steps on H100s (FP8)",
        ("model", "GPUs", "layout", "published s", "predicted s", "error"),
        rows,
        note,
    )


def predicted() -> Iterator[Table]:
    """A step of the recipe's RL on DAPO problems for larger models, and memory of the fullest GPU."""
    rows = []
    for name, words in LARGE.items():
        for gpus in (8, 64, 256, 1024):
            recipe = read_recipe(
                ROOT / "recipes/qwen3_4b/curriculum.yaml", [f"model.path=Qwen/{name}", *words.split()]
            )
            made = plan(recipe, gpus)
            stage = made.stages[-1]
            memory = stage.memories[stage.fullest].total / GIB
            time = stage.time
            each = (time.rollout, time.logprobs, time.update, time.total)
            over = " (does not fit)" if memory > 80 else ""
            rows.append((name, str(gpus), *(f"{x:.0f}" for x in each), f"{memory:.0f}{over}"))
    yield Table(
        "Predicted: 2,048 traces a step, all of full length, in bfloat16 on H100s",
        ("model", "GPUs", "rollout s", "log-probs s", "update s", "step s", "GiB a GPU"),
        rows,
        "`parallel-r1 plan RECIPE --gpus N` says the same of any recipe, stage by stage.",
    )


if __name__ == "__main__":
    main()
