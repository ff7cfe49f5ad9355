"""How the embedding rows of new tags should start: `python -m benchmarks.new_tags`.

Trains the cold start of recipes/smollm2 on SmolLM2-135M-Instruct for a few dozen steps, once for each way,
in ten minutes a way on one core. At some steps it measures the held-out nats of each tag that is drawn and
of all other targets, the share of responses to held-out problems that have a block, and the well-formed
share of the blocks. What is done is kept in runs/new_tags/, so that the same command goes on.

| way | rows of the new tags |
|---|---|
| `mean` | mean of all rows, and noise of 0.1 standard deviations |
| `subwords` | mean of the rows of the tag text's own subwords, and that noise |
| `first` | copy of the row of the first of these subwords, and that noise |
| `rows_first` | as `subwords`; the first 8 steps train only these rows, at `--rows-rate` |
| `rows_rate` | as `subwords`; in all steps their updates are ten times as large |
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from megatron_parallel_r1.config.recipe import Recipe
from megatron_parallel_r1.config.stages import SftStage
from megatron_parallel_r1.data.problems import Example, Problem
from megatron_parallel_r1.distributed import process
from megatron_parallel_r1.model.weights import hf_tensors
from megatron_parallel_r1.rewards.verifier import Verifier
from megatron_parallel_r1.rl.metrics import trace_metrics
from megatron_parallel_r1.rl.rollout_worker import sample_and_verify
from megatron_parallel_r1.rollout.thinking import Thinker
from megatron_parallel_r1.run.context import RunContext, native_engine
from megatron_parallel_r1.sft.loop import example_row, sft_step
from megatron_parallel_r1.thought.layout import Row
from megatron_parallel_r1.thought.tags import TAG_TEXTS
from megatron_parallel_r1.thought.tokenizer import spread_new_embeddings, tag_subwords
from megatron_parallel_r1.train.micro_batch import MicroBatch, partition_rows
from megatron_parallel_r1.train.trainer import LrSchedule, Trainer
from megatron_parallel_r1.utils.exit import run_and_exit
from megatron_parallel_r1.utils.tables import markdown_table
from recipes.smollm2.model import model_folder
from recipes.smollm2.word_problems import draw_problem, examples, write_trace

OUT = Path("runs/new_tags")
WAYS = ("mean", "subwords", "first", "rows_first", "rows_rate")
DRAWN_TAGS = ("<Parallel>", "</Path>", "</Summary>")  # the engine forces the others
FIRST_STEPS = 8
CAPACITY = 1024
HELD_OUT = 32


def recipe(lr: float, steps: int, batch: int) -> Recipe:
    """The cold start of recipes/smollm2 as a recipe of its own."""
    stage = {
        "name": "cold_start",
        "kind": "sft",
        "data": {"source": "embedded_cold_start"},  # in name only: `main` draws the examples
        "steps": steps,
        "examples_per_step": batch,
        "optimizer": {"lr": lr, "warmup_steps": 4},
    }
    thinking = {
        "paths": 3,
        "max_blocks": 1,
        "max_path_tokens": 32,
        "max_response_tokens": 160,
        "reserve_tokens": 32,
    }
    return Recipe.read(
        {
            "name": "new_tags",
            "model": {"path": str(model_folder())},
            "tokenizer": {"kind": "folder"},
            "prompt_template": "{problem}\nEnd with the line `Final Answer: N`.",
            "thinking": thinking,
            "max_tokens_per_micro_batch": CAPACITY,
            "stages": [stage],
        },
        "the benchmark's recipe",
    )


def rows_of(run: RunContext, shown: Sequence[dict[str, str]]) -> list[Row]:
    """Lays out examples as SFT does."""
    problems = [Problem(str(i), row["problem"], (row["answer"],), "words") for i, row in enumerate(shown)]
    return [
        example_row(
            Example(problem, row["response"]), run.tokenizer, run.tags, run.recipe.prompt_template, "isolated"
        )
        for problem, row in zip(problems, shown, strict=True)
    ]


def held_out_examples() -> list[dict[str, str]]:
    """Held-out problems, each with a parallel trace."""
    rng = random.Random("new tags")
    problems = [draw_problem(rng, held_out=True) for _ in range(HELD_OUT)]
    return [
        {"problem": p.question, "answer": str(p.answer), "response": write_trace(p, rng, paths=3)}
        for p in problems
    ]


def set_rows(run: RunContext, trainer: Trainer, way: str) -> torch.nn.Parameter:
    """Starts the rows of the tags; returns the embedding."""
    embedding = next(p for name, p in trainer.model[0].named_parameters() if "word_embeddings" in name)
    subwords = tag_subwords(run.tokenizer)
    if way == "mean":
        subwords = {}
    if way == "first":
        subwords = {tag: tokens[:1] for tag, tokens in subwords.items()}
    with torch.no_grad():
        spread_new_embeddings(embedding, sorted(run.tags.ids), run.recipe.seed, subwords)
    trainer.optimizer.reload_model_params()
    return embedding


@contextmanager
def only_rows(trainer: Trainer, embedding: torch.nn.Parameter, ids: Sequence[int]) -> Iterator[None]:
    """Clears the gradients of everything but some rows of the embedding, before each step in the block."""
    prepare = trainer.optimizer.prepare_grads

    def prepare_rows() -> bool:
        for stage in trainer.model:
            for parameter in stage.parameters():
                kept = parameter.main_grad[list(ids)].clone() if parameter is embedding else None
                parameter.main_grad.zero_()
                if kept is not None:
                    parameter.main_grad[list(ids)] = kept
        return prepare()

    trainer.optimizer.prepare_grads = prepare_rows
    try:
        yield
    finally:
        trainer.optimizer.prepare_grads = prepare


def measure(
    run: RunContext, trainer: Trainer, rows: Sequence[Row], verifier: Verifier, draws: int
) -> dict[str, Any]:
    """Held-out nats by tag, and the format of drawn responses."""
    batches = [
        MicroBatch.of(row, trainer.device) for row in partition_rows(rows, CAPACITY, trainer.partition)
    ]
    texts = dict(zip(run.tags.ids, TAG_TEXTS, strict=True))
    nats = defaultdict(list)
    for batch, logprobs_N in zip(batches, trainer.logprobs(batches), strict=True):
        for label, logprob in zip(batch.labels_N.tolist(), logprobs_N.tolist(), strict=True):
            nats[texts.get(label, "other")].append(-logprob)
    record: dict[str, Any] = {name: fmean(nats[name]) for name in (*DRAWN_TAGS, "other")}
    engine = native_engine(run.shape)
    engine.load_weights(hf_tensors(trainer.model), version=0)
    shown = held_out_examples()[:draws]
    problems = [Problem(str(i), row["problem"], (row["answer"],), "words") for i, row in enumerate(shown)]
    traces, judged = sample_and_verify(
        Thinker(engine, run.tags, run.recipe.thinking),
        problems,
        range(draws),
        run.tokenizer,
        run.recipe.prompt_template,
        verifier,
        64,
    )
    found = trace_metrics([trace.outline for trace in traces], judged)
    return record | {name: found[name] for name in ("parallel_ratio", "well_formed", "accuracy")}


def train(way: str, args: argparse.Namespace) -> None:
    """Trains one way and keeps a line for each measured step."""
    settings = recipe(args.lr, max(args.steps), args.batch)
    run = RunContext.set_up(settings, OUT / way, resume=False)
    stage = settings.stages[0]
    assert isinstance(stage, SftStage)
    stream = iter(rows_of(run, list(itertools.islice(examples(0, sequential=0), stage.steps * args.batch))))
    held_out = rows_of(run, held_out_examples())
    schedule = LrSchedule(args.lr, stage.optimizer.warmup_steps)
    lines = []
    with process.running(seed=0), Verifier(workers=1) as verifier:
        trainer = run.trainer(stage)
        embedding = set_rows(run, trainer, way)
        ids = list(run.tags.ids)
        for step in range(stage.steps + 1):
            if step:
                batch = list(itertools.islice(stream, args.batch))
                before = embedding.detach()[ids].clone()
                if way == "rows_first" and step <= FIRST_STEPS:
                    with only_rows(trainer, embedding, ids):
                        update = sft_step(trainer, batch, CAPACITY, args.rows_rate)
                else:
                    update = sft_step(trainer, batch, CAPACITY, schedule.at(step, stage.steps))
                if way == "rows_rate":
                    with torch.no_grad():
                        embedding[ids] += 9 * (embedding[ids] - before)
                    trainer.optimizer.reload_model_params()
                print(f"{way}  step {step}/{stage.steps}  loss {update.loss:.3f}", flush=True)
            if step in (0, *args.steps):
                draws = args.draws if step else 4
                lines.append({"way": way, "step": step, **measure(run, trainer, held_out, verifier, draws)})
                print(json.dumps(lines[-1]), flush=True)
    OUT.mkdir(parents=True, exist_ok=True)
    file_of(way, args.lr).write_text("".join(json.dumps(line) + "\n" for line in lines))


def file_of(way: str, lr: float) -> Path:
    return OUT / f"{way}_{lr:g}.jsonl"


def table(ways: Sequence[str], lr: float) -> str:
    """The measured steps of all ways, as Markdown."""
    lines = [json.loads(line) for way in ways for line in file_of(way, lr).read_text().splitlines()]

    def share(value: float | None) -> str:
        return "–" if value is None else f"{value:.0%}"

    return markdown_table(
        ("way", "SFT steps", *(f"`{tag}`" for tag in DRAWN_TAGS), "other", "with a block", "well-formed"),
        [
            (
                f"`{line['way']}`",
                line["step"],
                *(f"{line[name]:.2f}" for name in (*DRAWN_TAGS, "other")),
                share(line["parallel_ratio"]),
                share(line["well_formed"]),
            )
            for line in lines
        ],
        "lrrrrrrr",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare ways to start the rows of new tags.")
    parser.add_argument("--ways", default=",".join(WAYS), help=f"comma-separated, of {', '.join(WAYS)}")
    parser.add_argument("--steps", type=int, nargs="+", default=[16, 32, 64], help="SFT steps to measure at")
    parser.add_argument("--batch", type=int, default=8, help="examples of a step")
    parser.add_argument("--lr", type=float, default=4e-4, help="learning rate")
    parser.add_argument(
        "--rows-rate", type=float, default=1e-2, help="of `rows_first`, while only rows learn"
    )
    parser.add_argument("--draws", type=int, default=24, help="responses drawn at a measured step")
    args = parser.parse_args()
    ways = args.ways.split(",")
    for way in ways:
        if not file_of(way, args.lr).is_file():
            train(way, args)
    print(table(ways, args.lr))


if __name__ == "__main__":
    run_and_exit(main, "the same command goes on with the next way")
