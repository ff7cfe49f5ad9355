"""The commands `eval/run.py` and `eval/compare.py`: flags and output files."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.evaluation.benchmarks import EMBEDDED, EMBEDDED_PROBLEMS, PUBLISHED, read_benchmarks
from megatron_parallel_r1.evaluation.checkpoints import Checkpoint, open_checkpoint, stages_of
from megatron_parallel_r1.evaluation.engines import ENGINES
from megatron_parallel_r1.evaluation.evaluator import (
    BenchmarkResult,
    EvaluationPlan,
    evaluate,
    write_summaries,
)
from megatron_parallel_r1.evaluation.modes import EvaluationMode
from megatron_parallel_r1.evaluation.output import DEFAULT_OUT, check_out, writing
from megatron_parallel_r1.evaluation.pairs import paired_tests
from megatron_parallel_r1.evaluation.plot import draw_plot, save_plot, svg_of
from megatron_parallel_r1.evaluation.tables import Table, evaluation_tables, html_page, markdown_page
from megatron_parallel_r1.utils.exit import one_line_exit
from megatron_parallel_r1.utils.rank import is_rank_zero, world_size


def run_command(words: Sequence[str] | None = None) -> None:
    """Runs `eval/run.py`: one checkpoint in one mode.

    Raises:
        UserError: a flag, a file or a checkpoint is invalid.
    """
    parser = _parser("Evaluate one checkpoint in one mode.")
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="a released folder, or a run's or a stage's"
    )
    parser.add_argument("--mode", default="parallel", help="parallel (as stored), sequential or majority@k")
    args = parser.parse_args(words)
    mode, console, plan = EvaluationMode.of(args.mode), _console(), _plan(args)
    checkpoint = open_checkpoint(args.checkpoint)
    benchmarks = read_benchmarks(_words(args.benchmarks), args.data, args.limit)
    results = evaluate(checkpoint, benchmarks, mode, plan, console)
    if is_rank_zero():
        _write(
            results,
            evaluation_tables([r.summary for r in results]),
            args.out / f"{checkpoint.name}_{mode}",
            console,
        )


def compare_command(words: Sequence[str] | None = None) -> None:
    """Runs `eval/compare.py`: several checkpoints or the stages of a run, in one or more modes.

    Raises:
        UserError: a flag, a file or a checkpoint is invalid.
    """
    parser = _parser("Compare checkpoints, or the stages of a run, on the same problems.")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        action="append",
        default=[],
        help="repeatable; the first is the baseline",
    )
    parser.add_argument("--run", type=Path, help="a run folder: all its finished stages")
    parser.add_argument("--stages", help="only these stages of the run, comma-separated")
    parser.add_argument(
        "--modes", default="parallel", help="comma-separated, such as parallel,sequential,majority@4"
    )
    args = parser.parse_args(words)
    if world_size() > 1:
        raise UserError(
            "eval/compare.py: start one process; run eval/run.py under torchrun first, this reads its records"
        )
    modes, console, plan = [EvaluationMode.of(word) for word in _words(args.modes)], _console(), _plan(args)
    checkpoints = _checkpoints(args.run, args.stages, args.checkpoint)
    benchmarks = read_benchmarks(_words(args.benchmarks), args.data, args.limit)
    for mode in modes:
        plan.samples_in(mode)
    results = [
        result
        for checkpoint in checkpoints
        for mode in modes
        for result in evaluate(checkpoint, benchmarks, mode, plan, console)
    ]
    results.sort(key=lambda result: [b.name for b in benchmarks].index(result.summary.benchmark))
    _write(
        results,
        evaluation_tables([r.summary for r in results], paired_tests(results)),
        args.out / "comparison",
        console,
    )


def run_and_exit(command: Callable[[], None]) -> None:
    """Runs a command as `parallel-r1` does: expected errors end in one line and an exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with one_line_exit("the same command continues from the records"):
        command()


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    known = ", ".join((*PUBLISHED, *EMBEDDED))
    parser.add_argument("--benchmarks", required=True, help=f"comma-separated, of {known}; name=FILE: a copy")
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
    parser.add_argument("--tensor", type=int, default=1, help="processes that share one copy of the model")
    parser.add_argument("--concurrent", type=int, default=256, help="responses in flight, per model copy")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder for records and tables")
    return parser


def _plan(args: argparse.Namespace) -> EvaluationPlan:
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
        concurrent=args.concurrent,
    )


def _checkpoints(run: Path | None, stages: str | None, folders: Sequence[Path]) -> list[Checkpoint]:
    """The stages of a run, then single folders, under distinct names."""
    checkpoints = stages_of(run) if run is not None else []
    if stages is not None:
        wanted, known = _words(stages), [checkpoint.name for checkpoint in checkpoints]
        if missing := [name for name in wanted if name not in known]:
            raise UserError(
                f"--stages {missing[0]}: no finished stage of --run; it has {', '.join(known) or 'none'}"
            )
        checkpoints = [checkpoint for checkpoint in checkpoints if checkpoint.name in wanted]
    for folder in folders:
        opened = open_checkpoint(folder)
        taken = {checkpoint.name for checkpoint in checkpoints}
        checkpoints.append(opened if opened.name not in taken else replace(opened, name=str(folder)))
    if not checkpoints:
        raise UserError("nothing to compare; give --run RUN, or two --checkpoint or more")
    return checkpoints


def _write(results: Sequence[BenchmarkResult], tables: Sequence[Table], stem: Path, console: Console) -> None:
    """Writes `<stem>.md`, `.html` and `.json`; for several checkpoints also the plot, `.png` and `.svg`."""
    several = len({(r.summary.checkpoint, r.summary.step) for r in results}) > 1
    svg = None
    with writing(stem.parent):
        stem.parent.mkdir(parents=True, exist_ok=True)
        if several:
            figure = draw_plot([result.summary for result in results])
            save_plot(figure, stem.with_name(f"{stem.name}.png"))
            svg = svg_of(figure)
            stem.with_name(f"{stem.name}.svg").write_text(svg, encoding="utf-8")
        stem.with_name(f"{stem.name}.md").write_text(markdown_page(tables), encoding="utf-8")
        stem.with_name(f"{stem.name}.html").write_text(html_page(tables, svg), encoding="utf-8")
        write_summaries(results, stem.with_name(f"{stem.name}.json"))
    for table in tables:
        console.print(table.terminal())
    console.print(f"tables   {stem}.md, {stem}.html", soft_wrap=True, highlight=False)


def _words(text: str) -> list[str]:
    return [word for word in (part.strip() for part in text.split(",")) if word]


def _console() -> Console:
    """As wide as the terminal; wide enough for the tables in a log. Quiet except on rank 0."""
    console = Console(quiet=not is_rank_zero())
    return console if console.is_terminal else Console(width=190, quiet=console.quiet)
