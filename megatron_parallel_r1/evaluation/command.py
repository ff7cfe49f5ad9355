"""The two commands of `eval/`: their flags, and what they write."""

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
from megatron_parallel_r1.evaluation.modes import Mode
from megatron_parallel_r1.evaluation.pairs import pairs_of
from megatron_parallel_r1.evaluation.plot import draw_plot, save_plot, svg_of
from megatron_parallel_r1.evaluation.records import USUAL, check_out, writing
from megatron_parallel_r1.evaluation.runs import Plan, Result, evaluate, write_summaries
from megatron_parallel_r1.evaluation.table import Table, html_page, markdown_page, tables_of
from megatron_parallel_r1.utils.exit import one_line_exit
from megatron_parallel_r1.utils.rank import is_rank_zero, world_size


def run_command(words: Sequence[str] | None = None) -> None:
    """`eval/run.py`: one checkpoint in one mode.

    Raises:
        UserError: a flag, a file or a checkpoint cannot be used.
    """
    parser = _parser("Evaluate one checkpoint in one mode.")
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="a released folder, or a run's or a stage's"
    )
    parser.add_argument("--mode", default="parallel", help="parallel (as stored), sequential or majority@k")
    told = parser.parse_args(words)
    mode, console, plan = Mode.of(told.mode), _console(), _plan(told)
    checkpoint = open_checkpoint(told.checkpoint)
    benchmarks = read_benchmarks(_words(told.benchmarks), told.data, told.limit)
    results = evaluate(checkpoint, benchmarks, mode, plan, console)
    if is_rank_zero():
        _write(
            results, tables_of([r.summary for r in results]), told.out / f"{checkpoint.name}_{mode}", console
        )


def compare_command(words: Sequence[str] | None = None) -> None:
    """`eval/compare.py`: several checkpoints or the stages of a run, in one mode or more.

    Raises:
        UserError: a flag, a file or a checkpoint cannot be used.
    """
    parser = _parser("Compare checkpoints, or the stages of a run, on the same problems.")
    parser.add_argument(
        "--checkpoint", type=Path, action="append", default=[], help="repeat it; the first is the base"
    )
    parser.add_argument("--run", type=Path, help="a run folder: all its finished stages")
    parser.add_argument("--stages", help="only these stages of the run, by comma")
    parser.add_argument(
        "--modes", default="parallel", help="by comma, such as parallel,sequential,majority@4"
    )
    told = parser.parse_args(words)
    if world_size() > 1:
        raise UserError(
            "eval/compare.py: one process; run eval/run.py under torchrun, this reads what it drew"
        )
    modes, console, plan = [Mode.of(word) for word in _words(told.modes)], _console(), _plan(told)
    checkpoints = _checkpoints(told.run, told.stages, told.checkpoint)
    benchmarks = read_benchmarks(_words(told.benchmarks), told.data, told.limit)
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
        tables_of([r.summary for r in results], pairs_of(results, plan.seed)),
        told.out / "comparison",
        console,
    )


def explained(command: Callable[[], None]) -> None:
    """Runs a command as `parallel-r1` does: expected errors end in one line and an exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with one_line_exit("the same command continues from the records"):
        command()


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    known = ", ".join((*PUBLISHED, *EMBEDDED))
    parser.add_argument("--benchmarks", required=True, help=f"by comma, of {known}; name=FILE for a copy")
    parser.add_argument("--data", type=Path, help="a folder of local copies; otherwise the Hugging Face Hub")
    parser.add_argument(
        "--limit", type=int, help=f"only the first so many problems (embedded ones: {EMBEDDED_PROBLEMS})"
    )
    parser.add_argument("--samples", type=int, help="of each problem; default 1, in majority@k k")
    parser.add_argument("--seed", type=int, default=0, help="of the draws and of the bootstrap")
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
    parser.add_argument("--engine", default="native", help=f"of {', '.join(ENGINES)}")
    parser.add_argument(
        "--server", dest="servers", action="append", default=[], help="of a server engine; repeat it"
    )
    parser.add_argument("--tensor", type=int, default=1, help="processes that share one copy of the model")
    parser.add_argument("--concurrent", type=int, default=256, help="responses in flight, of one copy")
    parser.add_argument("--out", type=Path, default=USUAL, help="records and tables")
    return parser


def _plan(told: argparse.Namespace) -> Plan:
    check_out(told.out)
    return Plan(
        out=told.out,
        samples=told.samples,
        seed=told.seed,
        settings=tuple(told.settings),
        prompt=told.prompt,
        engine=told.engine,
        tensor=told.tensor,
        servers=tuple(told.servers),
        concurrent=told.concurrent,
    )


def _checkpoints(run: Path | None, stages: str | None, folders: Sequence[Path]) -> list[Checkpoint]:
    """The stages of a run, then single folders, under names that differ."""
    found = stages_of(run) if run is not None else []
    if stages is not None:
        wanted, known = _words(stages), [checkpoint.name for checkpoint in found]
        if missing := [name for name in wanted if name not in known]:
            raise UserError(
                f"--stages {missing[0]}: no finished stage of --run; it has {', '.join(known) or 'none'}"
            )
        found = [checkpoint for checkpoint in found if checkpoint.name in wanted]
    for folder in folders:
        opened = open_checkpoint(folder)
        taken = {checkpoint.name for checkpoint in found}
        found.append(opened if opened.name not in taken else replace(opened, name=str(folder)))
    if not found:
        raise UserError("nothing to compare; give --run RUN, or --checkpoint twice or more")
    return found


def _write(results: Sequence[Result], tables: Sequence[Table], stem: Path, console: Console) -> None:
    """`<stem>.md`, `.html` and `.json`; of several checkpoints also the plot, `.png` and `.svg`."""
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
    """As wide as the terminal; a log takes the whole table. Only the first process speaks."""
    console = Console(quiet=not is_rank_zero())
    return console if console.is_terminal else Console(width=190, quiet=console.quiet)
