"""The commands `evaluate` and `compare`, which are also `eval/run.py` and `eval/compare.py`.

Function bodies import what they need, so that `--help` is fast.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.evaluation.benchmarks import (
    EMBEDDED,
    EMBEDDED_PROBLEMS,
    PUBLISHED,
    Benchmark,
    read_benchmarks,
)
from megatron_parallel_r1.evaluation.engines import ENGINES
from megatron_parallel_r1.evaluation.output import DEFAULT_OUT, check_out
from megatron_parallel_r1.utils.hub import local_folder
from megatron_parallel_r1.utils.rank import is_rank_zero, world_size

if TYPE_CHECKING:
    from megatron_parallel_r1.evaluation.evaluator import EvaluationPlan

RESUME = "the same command continues from the records"


def evaluate_command(words: Sequence[str] | None = None) -> None:
    """Runs `eval/run.py`: one checkpoint in one mode.

    Raises:
        UserError: a flag, a file or a checkpoint is invalid.
    """
    parser = _parser("Evaluate one checkpoint in one mode.")
    parser.add_argument(
        "--checkpoint", type=local_folder, required=True, help="a released folder, or a run's or a stage's"
    )
    parser.add_argument("--mode", default="parallel", help="parallel (as stored), sequential or majority@k")
    parser.add_argument(
        "--card",
        help="model card that gets the figures: a model's folder, or its name on the Hugging Face Hub",
    )
    args = _parse(parser, words)
    from megatron_parallel_r1.evaluation.card import add_to_card, check_card
    from megatron_parallel_r1.evaluation.checkpoints import open_checkpoint
    from megatron_parallel_r1.evaluation.evaluator import evaluate
    from megatron_parallel_r1.evaluation.modes import EvaluationMode
    from megatron_parallel_r1.evaluation.presentation import write_pages

    if args.card is not None:
        check_card(args.card)
    mode, console, plan = EvaluationMode.of(args.mode), _console(), _plan(args)
    checkpoint = open_checkpoint(args.checkpoint)
    benchmarks = _benchmarks(args)
    results = evaluate(checkpoint, benchmarks, mode, plan, console)
    if is_rank_zero():
        write_pages(results, (), args.out / f"{checkpoint.name}_{mode}", console)
        if args.card is not None:
            add_to_card([result.summary for result in results], args.card)
            console.print(f"card     {args.card}", soft_wrap=True, highlight=False)


def compare_command(words: Sequence[str] | None = None) -> None:
    """Runs `eval/compare.py`: several checkpoints or the stages of a run, in one or more modes.

    Raises:
        UserError: a flag, a file or a checkpoint is invalid.
    """
    parser = _parser("Compare checkpoints, or the stages of a run, on the same problems.")
    parser.add_argument(
        "--checkpoint",
        type=local_folder,
        action="append",
        default=[],
        help="repeatable; the first is the baseline",
    )
    parser.add_argument("--run", type=Path, help="a run folder: all its finished stages")
    parser.add_argument("--stages", help="only these stages of the run, comma-separated")
    parser.add_argument(
        "--modes", default="parallel", help="comma-separated, such as parallel,sequential,majority@4"
    )
    args = _parse(parser, words)
    if world_size() > 1:
        raise UserError(
            "eval/compare.py: start one process; run eval/run.py under torchrun first, this reads its records"
        )
    from megatron_parallel_r1.evaluation.checkpoints import choose_checkpoints
    from megatron_parallel_r1.evaluation.evaluator import evaluate
    from megatron_parallel_r1.evaluation.modes import EvaluationMode
    from megatron_parallel_r1.evaluation.presentation import write_pages
    from megatron_parallel_r1.evaluation.summary import paired_tests

    modes, console, plan = [EvaluationMode.of(word) for word in _words(args.modes)], _console(), _plan(args)
    stages = None if args.stages is None else _words(args.stages)
    checkpoints = choose_checkpoints(args.run, stages, args.checkpoint)
    benchmarks = _benchmarks(args)
    for mode in modes:
        plan.samples_in(mode)
    results = [
        result
        for checkpoint in checkpoints
        for mode in modes
        for result in evaluate(checkpoint, benchmarks, mode, plan, console)
    ]
    results.sort(key=lambda result: [b.name for b in benchmarks].index(result.summary.benchmark))
    write_pages(results, paired_tests(results), args.out / "comparison", console)


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    known = ", ".join((*PUBLISHED, *EMBEDDED))
    parser.add_argument(
        "--benchmarks",
        required=True,
        help=f"comma-separated, of {known}; NAME=FILE: a copy of it, or rows of your own",
    )
    parser.add_argument(
        "--columns", help="of rows of your own: prompt=NAME,answer=NAME; default: found by their usual names"
    )
    parser.add_argument("--data", type=Path, help="folder of local copies; default: the Hugging Face Hub")
    parser.add_argument(
        "--limit", type=int, help=f"number of problems, the first ones (embedded: {EMBEDDED_PROBLEMS})"
    )
    parser.add_argument("--samples", type=int, help="responses to each problem; default: 1, in majority@k k")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument(
        "--set",
        dest="settings",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="decoding settings that differ from the checkpoint's, such as temperature=0.6 paths=4",
    )
    parser.add_argument(
        "--prompt", help="a template's name, or a text with {problem}, instead of the stored one"
    )
    parser.add_argument("--engine", default="native", help=f"one of {', '.join(ENGINES)}")
    parser.add_argument(
        "--server", dest="servers", action="append", default=[], help="URL of a rollout server; repeatable"
    )
    parser.add_argument("--key-variable", help="environment variable with the servers' API key")
    parser.add_argument("--key-file", type=Path, help="file with that key, instead")
    parser.add_argument("--tensor", type=int, default=1, help="processes that share one copy of the model")
    parser.add_argument("--concurrent", type=int, default=256, help="responses in flight, per model copy")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder for records and tables")
    return parser


def _parse(parser: argparse.ArgumentParser, words: Sequence[str] | None) -> argparse.Namespace:
    args = parser.parse_args(words)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
    return args


def _plan(args: argparse.Namespace) -> EvaluationPlan:
    from megatron_parallel_r1.evaluation.evaluator import EvaluationPlan

    check_out(args.out)
    return EvaluationPlan(
        out=args.out,
        samples=args.samples,
        seed=args.seed,
        settings=tuple(args.settings),
        prompt=args.prompt,
        engine=args.engine,
        tensor=args.tensor,
        servers=tuple(args.servers),
        key_variable=args.key_variable,
        key_file=args.key_file,
        concurrent=args.concurrent,
    )


def _benchmarks(args: argparse.Namespace) -> tuple[Benchmark, ...]:
    from megatron_parallel_r1.data.columns import read_columns

    return read_benchmarks(_words(args.benchmarks), args.data, args.limit, read_columns(args.columns))


def _words(text: str) -> list[str]:
    return [word for word in (part.strip() for part in text.split(",")) if word]


def _console() -> Console:
    """As wide as the terminal; wide enough for the tables in a log. Quiet except on rank 0."""
    console = Console(quiet=not is_rank_zero())
    return console if console.is_terminal else Console(width=190, quiet=console.quiet)
