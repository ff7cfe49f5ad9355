"""Commands that train: curriculum, sft, rl, eval, coldstart, plan, report; and schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.utils.exit import block_stop_signals

RecipePath = Annotated[
    Path,
    typer.Argument(
        help="A YAML recipe, such as recipes/tiny/demo.yaml, or a packaged one, such as tiny/demo."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as seed=3 stages.rl_hard.steps=10."),
]
StageName = Annotated[
    str | None, typer.Option("--stage", help="Stage to run, if the recipe has several of the kind.")
]
Adapt = Annotated[
    bool, typer.Option("--adapt", help="Resume although settings or data of unfinished stages have changed.")
]


def register(app: typer.Typer) -> None:
    for command in (curriculum, sft, rl, distill, init, plan, report, traces, coldstart, download):
        app.command(rich_help_panel="Training")(command)
    app.command("eval", rich_help_panel="Training")(evaluate)
    app.command(rich_help_panel="Jobs")(doctor)


def curriculum(
    recipe: RecipePath,
    overrides: Overrides = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Delete the run folder of an earlier run and start over.")
    ] = False,
    adapt: Adapt = False,
) -> None:
    """Run all stages of a recipe, evaluate, release, report. The same command resumes a stopped run."""
    block_stop_signals()
    from megatron_parallel_r1.config.reader import read_recipe, refuse_single_stage

    # Before torch is imported: a mistake in the recipe is reported at once.
    refuse_single_stage(recipe)
    settings = read_recipe(recipe, overrides or ())
    from megatron_parallel_r1.curriculum.run import open_console, run

    console = open_console()
    for outcome in run(settings, fresh=fresh, adapt=adapt, console=console):
        console.print(f"release  {outcome.release}", soft_wrap=True, highlight=False)
        console.print(f"report   {outcome.report}", soft_wrap=True, highlight=False)


def sft(
    recipe: RecipePath, overrides: Overrides = None, stage: StageName = None, adapt: Adapt = False
) -> None:
    """Run one supervised stage of a recipe."""
    _run_stage("sft", recipe, overrides, stage, adapt)


def rl(
    recipe: RecipePath, overrides: Overrides = None, stage: StageName = None, adapt: Adapt = False
) -> None:
    """Run one reinforcement-learning stage of a recipe; the stage that it starts from must be done."""
    _run_stage("rl", recipe, overrides, stage, adapt)


def distill(
    recipe: RecipePath, overrides: Overrides = None, stage: StageName = None, adapt: Adapt = False
) -> None:
    """Run one stage that samples the model's own traces and keeps the right ones as data for SFT."""
    _run_stage("distill", recipe, overrides, stage, adapt)


def evaluate(
    recipe: RecipePath,
    overrides: Overrides = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A released folder. Default: the recipe's own release.")
    ] = None,
) -> None:
    """Evaluate a released checkpoint with the recipe's evaluation and thinking settings."""
    from megatron_parallel_r1.config.reader import read_recipe

    settings = read_recipe(recipe, overrides or (), trains=False)
    from megatron_parallel_r1.curriculum.evaluation import evaluate_checkpoint
    from megatron_parallel_r1.curriculum.run import open_console
    from megatron_parallel_r1.report.evaluation_table import evaluation_table

    record = evaluate_checkpoint(settings, checkpoint)
    open_console().print(evaluation_table([record]).terminal())


def doctor(
    out: Annotated[Path, typer.Option(help="Folder of the runs, which all nodes must share.")] = Path("runs"),
    engine: Annotated[
        Literal["auto", "native", "sglang", "vllm"],
        typer.Option(help="What samples in the trial run. auto: SGLang where it is installed, else native."),
    ] = "auto",
) -> None:
    """Try what the first hour of a run would find out, on this machine or on all ranks of a job."""
    block_stop_signals()
    from megatron_parallel_r1.curriculum.run import open_console
    from megatron_parallel_r1.doctor.run import examine_all

    if not examine_all(out, engine, open_console()):
        raise typer.Exit(1)


def coldstart(
    settings: Annotated[Path, typer.Argument(help="YAML settings; see docs/coldstart.md.")],
    overrides: Overrides = None,
) -> None:
    """Let a teacher write cold-start traces. The same command resumes and keeps the answers it has."""
    from megatron_parallel_r1.coldstart.settings import ColdStart
    from megatron_parallel_r1.config.reader import read_tree

    cold_start_settings = ColdStart.read(read_tree(settings, overrides or ()), str(settings))
    from megatron_parallel_r1.coldstart.run import cold_start

    outcome = cold_start(cold_start_settings, log=lambda line: typer.echo(line, err=True))
    kept, passed = outcome.written.traces, outcome.tally.passed
    out = cold_start_settings.out
    typer.echo(f"traces   {out / 'traces.parquet'} ({kept} of {passed} that pass)")
    typer.echo(f"report   {out / 'report.md'}")


def download(
    model: Annotated[str, typer.Argument(help="owner/name on the Hub, or owner/name@revision.")],
) -> None:
    """Download a model from the Hugging Face Hub. Recipes and commands then take its name for a folder."""
    from megatron_parallel_r1.utils.hub import download as fetch

    typer.echo(fetch(model))


def init(
    model: Annotated[str, typer.Option(help="A Hugging Face folder, or owner/name on the Hub.")],
    data: Annotated[str, typer.Option(help="Problems for RL: a file, a known data set, or NAME=FILE.")],
    cold_start: Annotated[
        str | None,
        typer.Option(help="Worked examples with the tags, likewise. Default: Parallel-R1/Parallel-GSM8K."),
    ] = None,
    evaluation: Annotated[
        str | None, typer.Option(help="Held-out problems, likewise. Default: no evaluation.")
    ] = None,
    columns: Annotated[
        str | None, typer.Option(help="Columns of the data: prompt=NAME,answer=NAME. Default: found by name.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs, 8 to a node; 0: this CPU.")] = 8,
    gpu_memory: Annotated[float, typer.Option(min=1, help="Memory of one GPU, in GiB.")] = 80,
    out: Annotated[Path, typer.Option(help="Recipe to write.")] = Path("recipe.yaml"),
) -> None:
    """Write a commented recipe for a model, data and GPUs, and try its data and its plan."""
    from megatron_parallel_r1.data.columns import read_columns
    from megatron_parallel_r1.planning.plan import GIB
    from megatron_parallel_r1.planning.starter import InitOptions, next_steps, starter
    from megatron_parallel_r1.utils.files import write_atomically

    if out.exists():
        raise UserError(f"{out}: exists; give another file with --out, or delete it")
    memory = round(gpu_memory * GIB)
    options = InitOptions(model, data, cold_start, evaluation, read_columns(columns), gpus, memory)
    written = starter(options, out.stem)
    write_atomically(out, written.text)
    typer.echo(f"{out}: {written.summary}; next:")
    for command in next_steps(options, out):
        typer.echo(f"  {command}")


def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Processes, one per GPU. Default: one replica of the model.")
    ] = None,
    gpu_memory: Annotated[float, typer.Option(min=1, help="Memory of one GPU, in GiB.")] = 80,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Longest prompt, in tokens.")] = 2000,
    example_tokens: Annotated[int, typer.Option(min=1, help="Longest SFT row, in tokens.")] = 4096,
    machine: Annotated[str, typer.Option(help="h100, or a YAML file with a machine's rates.")] = "h100",
) -> None:
    """Print a recipe's layout, steps, tokens, memory and time before a run. Needs no weights."""
    from megatron_parallel_r1.config.reader import read_recipe

    settings = read_recipe(recipe, overrides or ())
    from megatron_parallel_r1.planning.machine import read_machine
    from megatron_parallel_r1.planning.plan import GIB, plan
    from megatron_parallel_r1.planning.plan_text import plan_text
    from megatron_parallel_r1.planning.rollouts import LengthLimits

    planned = plan(
        settings,
        world=gpus or settings.parallel.smallest_world,
        gpu=round(gpu_memory * GIB),
        longest=LengthLimits(prompt_tokens, example_tokens),
        machine=read_machine(machine),
    )
    typer.echo(plan_text(planned))


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(help="A run folder, such as runs/tiny; several are compared.", metavar="RUN..."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="File to write. Default: report.html in the run folder; comparison.html for several."
        ),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Serve the page on this machine; it follows the run.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of --watch; 0 picks a free one.")] = 0,
) -> None:
    """Build report.html from a run folder, also during the run, or a page that compares several runs."""
    if watch:
        from megatron_parallel_r1.report.watch import serve_report

        if out is not None:
            raise UserError("report: --watch serves the page and writes no file; leave --out away")
        serve_report(folders, port)
        return
    from megatron_parallel_r1.report.html import build_report

    typer.echo(build_report(*folders, out=out))


def traces(
    folder: Annotated[Path, typer.Argument(help="A run folder, such as runs/tiny.")],
    stage: Annotated[str | None, typer.Option(help="Only of this stage.")] = None,
    step: Annotated[int | None, typer.Option(min=0, help="Only of this step.")] = None,
    kind: Annotated[
        Literal["all", "right", "wrong", "malformed"], typer.Option(help="Which traces.")
    ] = "all",
    longest: Annotated[bool, typer.Option("--longest", help="The longest instead of the last.")] = False,
    count: Annotated[int, typer.Option(min=1, help="Most traces to show.")] = 4,
) -> None:
    """Show recorded traces of a run as trees, also during the run."""
    from rich.console import Console

    from megatron_parallel_r1.report.trace_tree import chosen_traces, trace_tree

    console = Console()
    console = console if console.is_terminal else Console(width=160)
    for name, record in chosen_traces(folder, stage, step, kind, longest, count):
        console.print(trace_tree(name, record))


def _run_stage(kind: str, recipe: Path, overrides: list[str] | None, stage: str | None, adapt: bool) -> None:
    block_stop_signals()
    from megatron_parallel_r1.config.reader import read_recipe, stage_to_run

    settings = read_recipe(recipe, overrides or ())
    name = stage_to_run(settings, recipe, kind, stage)
    from megatron_parallel_r1.curriculum.run import open_console, run

    console = open_console()
    for outcome in run(settings, only={name}, adapt=adapt, console=console):
        console.print(f"report   {outcome.report}", soft_wrap=True, highlight=False)


def schema(
    coldstart: Annotated[
        bool, typer.Option("--coldstart", help="The settings of `coldstart` instead of a recipe.")
    ] = False,
) -> None:
    """Print the JSON schema of recipes, for editors. docs/recipe_reference.md lists the keys."""
    from megatron_parallel_r1.coldstart.settings import ColdStart
    from megatron_parallel_r1.config.recipe import Recipe

    kind = ColdStart if coldstart else Recipe
    typer.echo(json.dumps(kind.model_json_schema(), indent=2, ensure_ascii=False))
