"""Commands on checkpoints: convert, verify, release, inspect, evaluate, compare.

Their flags are those of the scripts under checkpoints_tools/ and eval/; conversion/command.py and
evaluation/command.py parse them.
"""

from __future__ import annotations

import sys

import typer

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

convert = typer.Typer(no_args_is_help=True, help="Convert between Hugging Face and Megatron checkpoints.")


def register(app: typer.Typer) -> None:
    panel = "Checkpoints"
    app.add_typer(convert, name="convert", rich_help_panel=panel)
    for command in (verify, release, inspect, evaluate, compare):
        app.command(context_settings=PASS_ON, rich_help_panel=panel)(command)


@convert.command(context_settings=PASS_ON)
def hf_to_megatron(context: typer.Context) -> None:
    """Convert a Hugging Face folder to a distributed Megatron checkpoint."""
    from megatron_parallel_r1.conversion.command import hf_to_megatron_command, run_and_exit

    arguments = _arguments(context)
    run_and_exit(lambda: hf_to_megatron_command(arguments))


@convert.command(context_settings=PASS_ON)
def megatron_to_hf(context: typer.Context) -> None:
    """Convert a distributed Megatron checkpoint to a Hugging Face folder."""
    from megatron_parallel_r1.conversion.command import megatron_to_hf_command, run_and_exit

    arguments = _arguments(context)
    run_and_exit(lambda: megatron_to_hf_command(arguments))


def verify(context: typer.Context) -> None:
    """Check that two checkpoints, in either format, hold the same model."""
    from megatron_parallel_r1.conversion.command import run_and_exit, verify_command

    arguments = _arguments(context)
    run_and_exit(lambda: verify_command(arguments))


def release(context: typer.Context) -> None:
    """Write a folder ready to upload: weights, tokenizer, decoding settings, model card."""
    from megatron_parallel_r1.conversion.command import release_command, run_and_exit

    arguments = _arguments(context)
    run_and_exit(lambda: release_command(arguments))


def inspect(context: typer.Context) -> None:
    """Show what a checkpoint holds; with --check, compare its files with their digests."""
    from megatron_parallel_r1.conversion.command import inspect_command, run_and_exit

    arguments = _arguments(context)
    run_and_exit(lambda: inspect_command(arguments))


def evaluate(context: typer.Context) -> None:
    """Evaluate one checkpoint on benchmarks in one mode."""
    from megatron_parallel_r1.evaluation.command import run_and_exit, run_command

    arguments = _arguments(context)
    run_and_exit(lambda: run_command(arguments))


def compare(context: typer.Context) -> None:
    """Compare checkpoints, or the stages of a run, on the same problems."""
    from megatron_parallel_r1.evaluation.command import compare_command, run_and_exit

    arguments = _arguments(context)
    run_and_exit(lambda: compare_command(arguments))


def _arguments(context: typer.Context) -> list[str]:
    """The words after the command; its name replaces the program's in argparse's usage line."""
    sys.argv[0] = context.command_path
    return context.args
