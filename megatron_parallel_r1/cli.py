"""The command line, `parallel-r1`; its commands are listed by `parallel-r1 --help`."""

from __future__ import annotations

import gc
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Literal

import typer

from megatron_parallel_r1.distributed.stop_signals import block_stop_signals
from megatron_parallel_r1.utils.exit import one_line_exit

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train language models to think in parallel with reinforcement learning.",
)

RecipePath = Annotated[Path, typer.Argument(help="A YAML recipe, such as recipes/tiny/demo.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as seed=3 stages.rl_hard.steps=10."),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Delete what an earlier run left, and start anew.")]
Adapt = Annotated[
    bool, typer.Option("--adapt", help="Go on though stages that are not done are set otherwise now.")
]
StageName = Annotated[str | None, typer.Option("--stage", help="The stage to run, if there are several.")]


@app.command()
def curriculum(
    recipe: RecipePath, overrides: Overrides = None, fresh: Fresh = False, adapt: Adapt = False
) -> None:
    """Run all stages of a recipe, evaluate, release, report. Started again, it goes on where it stopped."""
    block_stop_signals()
    from megatron_parallel_r1.config.reader import read_recipe, refuse_single_stage
    from megatron_parallel_r1.curriculum.run import open_console, run

    console = open_console()
    refuse_single_stage(recipe)
    for outcome in run(read_recipe(recipe, overrides or ()), fresh=fresh, adapt=adapt, console=console):
        console.print(f"release  {outcome.release}", soft_wrap=True, highlight=False)
        console.print(f"report   {outcome.report}", soft_wrap=True, highlight=False)


@app.command()
def sft(recipe: RecipePath, overrides: Overrides = None, stage: StageName = None) -> None:
    """Run one supervised stage of a recipe."""
    _run_kind("sft", recipe, overrides, stage)


@app.command()
def rl(recipe: RecipePath, overrides: Overrides = None, stage: StageName = None) -> None:
    """Run one reinforcement-learning stage of a recipe; the stage that it starts from must be done."""
    _run_kind("rl", recipe, overrides, stage)


@app.command("eval")
def evaluate(
    recipe: RecipePath,
    overrides: Overrides = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A released folder; default: the recipe's own release.")
    ] = None,
) -> None:
    """Evaluate a released checkpoint with the recipe's evaluation and thinking settings."""
    from megatron_parallel_r1.config.reader import read_recipe
    from megatron_parallel_r1.curriculum.evaluation import evaluate_checkpoint
    from megatron_parallel_r1.curriculum.run import open_console
    from megatron_parallel_r1.report.tables import eval_table

    record = evaluate_checkpoint(read_recipe(recipe, overrides or ()), checkpoint)
    open_console().print(eval_table([record]))


@app.command()
def coldstart(
    settings: Annotated[Path, typer.Argument(help="YAML settings; see docs/coldstart.md.")],
    overrides: Overrides = None,
) -> None:
    """Have a teacher write cold-start traces. Started again, it asks only what has no answer yet."""
    from megatron_parallel_r1.coldstart.run import cold_start
    from megatron_parallel_r1.coldstart.settings import parse_settings
    from megatron_parallel_r1.config.reader import read_tree

    told = parse_settings(read_tree(settings, overrides or ()), str(settings))
    outcome = cold_start(told, tell=lambda line: typer.echo(line, err=True))
    kept, passed = outcome.written.traces, outcome.tally.passed
    typer.echo(f"traces   {told.out / 'traces.parquet'} ({kept} of {passed} that pass)")
    typer.echo(f"report   {told.out / 'report.md'}")


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Processes, one a GPU; default: one copy of the model.")
    ] = None,
    gpu_memory: Annotated[float, typer.Option(min=1, help="Of one GPU, in GiB.")] = 80,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Longest prompt to reckon with.")] = 2000,
    example_tokens: Annotated[int, typer.Option(min=1, help="Longest SFT row to reckon with.")] = 4096,
    machine: Annotated[str, typer.Option(help="h100, or a YAML file of a machine's rates.")] = "h100",
) -> None:
    """Say what a recipe will do and need: layout, steps, tokens, memory, time. Needs no weights."""
    from megatron_parallel_r1.config.reader import read_recipe
    from megatron_parallel_r1.planning.machine import read_machine
    from megatron_parallel_r1.planning.plan import GIB, plan
    from megatron_parallel_r1.planning.plan_text import plan_text
    from megatron_parallel_r1.planning.rollouts import LengthLimits

    told, longest = read_recipe(recipe, overrides or ()), LengthLimits(prompt_tokens, example_tokens)
    gpu, by = round(gpu_memory * GIB), read_machine(machine)
    world = gpus or told.parallel.replica_size
    typer.echo(plan_text(plan(told, world=world, gpu=gpu, longest=longest, machine=by)))


@app.command()
def serve(
    checkpoint: Annotated[Path, typer.Option(help="A released folder, such as runs/tiny/release.")],
    host: Annotated[str, typer.Option(help="Where to listen; default: this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="PARALLEL_R1_API_KEY", help="Clients send it as a bearer token.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Under which clients ask for the model.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: the GPU, if any.")] = None,
    running: Annotated[int, typer.Option(min=1, help="Requests that are decoded at once.")] = 8,
    cache_tokens: Annotated[
        int | None, typer.Option(min=1, help="That they may hold in the cache; default: as they need.")
    ] = None,
    waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait.")] = 64,
    seconds: Annotated[float, typer.Option(min=1, help="For one request, waiting included.")] = 600,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of a response; default: the training's.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of a prompt.")] = 4096,
) -> None:
    """Serve a released checkpoint: OpenAI's API, and a page where the paths grow side by side."""
    from megatron_parallel_r1.serve.admission import Limits
    from megatron_parallel_r1.serve.run import serve as run_server

    limits = Limits(
        running=running,
        cache_tokens=cache_tokens,
        waiting=waiting,
        seconds=seconds,
        max_tokens=max_tokens,
        prompt_tokens=prompt_tokens,
    )
    run_server(checkpoint, host, port, api_key, name, device, limits)


@app.command("serve-rollout")
def serve_rollout(
    checkpoint: Annotated[Path, typer.Option(help="A Hugging Face folder.")],
    options: Annotated[
        list[str] | None, typer.Argument(metavar="[-- OPTION]...", help="For each engine's own command line.")
    ] = None,
    engine: Annotated[Literal["sglang", "vllm"], typer.Option(help="Of the servers.")] = "sglang",
    servers: Annotated[int, typer.Option(min=1, help="How many.")] = 1,
    tp: Annotated[int, typer.Option(min=1, help="GPUs that share one copy of the weights.")] = 1,
    dp: Annotated[int, typer.Option(min=1, help="Copies in one server; weights then come by disk only.")] = 1,
    host: Annotated[str, typer.Option(help="0.0.0.0: reachable from other nodes.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the first server; 0: free ones.")] = 30000,
    memory_share: Annotated[float | None, typer.Option(min=0, max=1, help="Of a GPU's memory.")] = None,
    device: Annotated[Literal["cpu", "cuda"] | None, typer.Option(help="Default: the GPUs, if any.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the weights; default: float32 on a CPU.")] = None,
    context_tokens: Annotated[int | None, typer.Option(min=1, help="Prompt and continuation.")] = None,
    cache_tokens: Annotated[int, typer.Option(min=1, help="Of the key/value cache on a CPU.")] = 20000,
    deterministic: Annotated[
        bool, typer.Option(help="A draw depends on its seed and position alone.")
    ] = True,
    isolated: Annotated[bool, typer.Option("--isolated", help="Exact joins of isolated paths.")] = False,
    colocated: Annotated[bool, typer.Option("--colocated", help="Can give up its GPU memory.")] = False,
    python: Annotated[
        Path | None, typer.Option(help="The engine's; default: that of `make engines`.")
    ] = None,
    log_dir: Annotated[Path, typer.Option(help="One log file a server.")] = Path("runs/servers"),
    urls_file: Annotated[Path | None, typer.Option(help="Gets the URLs once all are healthy.")] = None,
    crashes: Annotated[int, typer.Option(min=1, help="In a row, then it gives up.")] = 3,
) -> None:
    """Start rollout servers of a checkpoint, start a crashed one again, end them all at the end."""
    from megatron_parallel_r1.rollout.launcher.run import serve_rollout as serve_until_told
    from megatron_parallel_r1.rollout.launcher.settings import Serving

    serving = Serving(
        checkpoint=checkpoint,
        engine=engine,
        servers=servers,
        tensor=tp,
        data=dp,
        host=host,
        port=port,
        device=device,
        dtype=dtype,
        memory_share=memory_share,
        context_tokens=context_tokens,
        cache_tokens=cache_tokens,
        deterministic=deterministic,
        isolated=isolated,
        colocated=colocated,
        python=python,
        log_dir=log_dir,
        urls_file=urls_file,
        crashes=crashes,
        options=tuple(options or ()),
    )
    serve_until_told(serving, tell=typer.echo)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A run folder, such as runs/tiny.")],
) -> None:
    """Build report.html from a run folder, also while the run goes on."""
    from megatron_parallel_r1.report.html import build_report

    typer.echo(build_report(folder))


def _run_kind(kind: str, recipe: Path, overrides: list[str] | None, stage: str | None) -> None:
    block_stop_signals()
    from megatron_parallel_r1.config.reader import read_recipe, stage_to_run
    from megatron_parallel_r1.curriculum.run import open_console, run

    console = open_console()
    told = read_recipe(recipe, overrides or ())
    for outcome in run(told, only={stage_to_run(told, recipe, kind, stage)}, console=console):
        console.print(f"report   {outcome.report}", soft_wrap=True, highlight=False)


def main() -> None:
    """Runs the command line. Expected errors end in one line and an exit code (utils/exit.py)."""
    # Megatron-Core announces at import what a CPU does not have; it is true and of no use here.
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module=r"megatron\.core.*")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # As torchrun does: threads of several small processes on few cores only wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Imports create half a million long-lived objects. Scanning them every 700 allocations, Python's default,
    # takes a tenth of the start-up time.
    gc.set_threshold(10_000)
    with one_line_exit():
        app()


if __name__ == "__main__":
    main()
