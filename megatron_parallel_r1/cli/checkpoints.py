"""Commands on checkpoints: convert, verify, release, inspect, evaluate, compare.

Their flags are those of the scripts under checkpoints_tools/ and eval/; conversion/command.py and
evaluation/command.py parse them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module

import typer

from megatron_parallel_r1.utils.exit import run_and_exit

PANEL = "Checkpoints"
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
CONVERT = {
    "hf-to-megatron": "Convert a Hugging Face folder to a distributed Megatron checkpoint.",
    "megatron-to-hf": "Convert a distributed Megatron checkpoint to a Hugging Face folder.",
}
CHECKPOINTS = {
    "verify": "Check that two checkpoints, in either format, hold the same model.",
    "release": "Write a folder ready to upload: weights, tokenizer, decoding settings, model card.",
    "inspect": "Show what a checkpoint holds; with --check, compare its files with their digests.",
}
EVALUATION = {
    "evaluate": "Evaluate one checkpoint on benchmarks in one mode.",
    "compare": "Compare checkpoints, or the stages of a run, on the same problems.",
}


def register(app: typer.Typer) -> None:
    convert = typer.Typer(no_args_is_help=True, help="Convert between Hugging Face and Megatron checkpoints.")
    app.add_typer(convert, name="convert", rich_help_panel=PANEL)
    _register(convert, "conversion", CONVERT)
    _register(app, "conversion", CHECKPOINTS)
    _register(app, "evaluation", EVALUATION)


def _register(app: typer.Typer, room: str, helps: dict[str, str]) -> None:
    for name, help in helps.items():
        command = _command(f"megatron_parallel_r1.{room}.command", f"{name.replace('-', '_')}_command")
        app.command(name, help=help, context_settings=PASS_ON, rich_help_panel=PANEL)(command)


def _command(module_name: str, function: str) -> Callable[[typer.Context], None]:
    def run(context: typer.Context) -> None:
        module = import_module(module_name)
        sys.argv[0] = context.command_path  # which argparse shows in its usage line
        run_and_exit(lambda: getattr(module, function)(context.args), module.RESUME)

    return run
