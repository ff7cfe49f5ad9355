"""The command line `parallel-r1`. Commands import what they need only when they run."""

from __future__ import annotations

import gc
import os
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from megatron_parallel_r1.cli import checkpoints, serving, training
from megatron_parallel_r1.cluster import command as cluster
from megatron_parallel_r1.utils.exit import one_line_exit

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train language models to think in parallel with reinforcement learning.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            typer.echo(f"parallel-r1 {version('megatron_parallel_r1')}")
        except PackageNotFoundError:
            typer.echo("parallel-r1, not installed (running from a checkout)")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    pass


training.register(app)
checkpoints.register(app)
serving.register(app)
app.command(rich_help_panel="Settings")(training.schema)
for _job_command in (cluster.submit, cluster.status, cluster.cancel, cluster.logs):
    app.command(rich_help_panel="Jobs")(_job_command)


def main() -> None:
    """Runs the command line. Expected errors end in one line and an exit code (utils/exit.py)."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # As torchrun does: threads of several small processes on few cores only wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Imports create half a million long-lived objects. Scanning them every 700 allocations, Python's default,
    # takes a tenth of the start-up time.
    gc.set_threshold(10_000)
    with one_line_exit():
        app()
