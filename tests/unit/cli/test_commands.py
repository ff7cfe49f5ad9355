"""The one command line: what it lists, and what it does not import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_parallel_r1.cli import app

HEAVY = ("torch", "transformers", "datasets", "megatron.core")
COMMANDS = (
    *("curriculum", "sft", "rl", "eval", "plan", "report", "coldstart", "serve", "serve-rollout", "schema"),
    *("convert", "verify", "release", "inspect", "evaluate", "compare", "submit", "status", "cancel", "logs"),
)
# Runs a command in this process and prints which of HEAVY were imported, on the last line of stdout.
PROBE = f"""
import sys
from megatron_parallel_r1.cli import main
sys.argv = ["parallel-r1", *sys.argv[1:]]
try:
    main()
finally:
    print("\\n" + repr([name for name in {HEAVY!r} if name in sys.modules]))
"""
# Shows the help of each command in one process and fails at the first that imports one of HEAVY.
HELP_PROBE = f"""
import sys
from typer.testing import CliRunner
from megatron_parallel_r1.cli import app
for command in sys.argv[1:]:
    shown = CliRunner().invoke(app, [*command.split(), "--help"])
    assert shown.exit_code == 0 and f"root {{command}}" in " ".join(shown.output.split()), shown.output
    imported = [name for name in {HEAVY!r} if name in sys.modules]
    assert not imported, (command, imported)
"""


def probe(*words: str) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, "-c", PROBE, *words], capture_output=True, text=True, timeout=300)
    *_, imported = done.stdout.splitlines()
    assert imported == "[]", imported
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_every_command_and_imports_nothing_heavy(flag: str) -> None:
    code, shown, _ = probe(flag)
    assert code == 0 and all(f" {name} " in shown for name in COMMANDS)


def test_help_of_no_command_imports_anything_heavy() -> None:
    commands = [name for name in COMMANDS if name != "convert"]
    commands += ["convert hf-to-megatron", "convert megatron-to-hf"]
    done = subprocess.run(
        [sys.executable, "-c", HELP_PROBE, *commands], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["curriculum", "sft", "rl", "eval", "plan"])
def test_a_missing_recipe_is_refused_before_anything_heavy_is_imported(command: str) -> None:
    code, _, error = probe(command, "no.yaml")
    assert code == 2 and error.startswith("error: no.yaml: No such file or directory; give the path")


@pytest.mark.parametrize(
    "override",
    ["stages.rl_hard.lrr=1", "thinking.paths=many", "model.layers=transformer_engine model.fp8=4"],
)
def test_so_is_an_ill_typed_one(override: str) -> None:
    code, _, error = probe("curriculum", "tiny/demo", *override.split())
    assert code == 2 and error.startswith("error: tiny/demo: ")


def test_so_are_settings_of_a_cold_start(tmp_path: Path) -> None:
    (tmp_path / "cold.yaml").write_text("teecher: {}")
    code, _, error = probe("coldstart", str(tmp_path / "cold.yaml"))
    assert code == 2 and "cold.yaml: " in error


def test_the_schema_is_one_of_recipes() -> None:
    shown = CliRunner().invoke(app, ["schema"])
    assert shown.exit_code == 0 and "max_tokens_per_micro_batch" in json.loads(shown.stdout)["properties"]
    shown = CliRunner().invoke(app, ["schema", "--coldstart"])
    assert "teacher" in json.loads(shown.stdout)["properties"]


def test_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout.startswith("parallel-r1")


@pytest.mark.parametrize("command", ["verify", "release", "inspect", "evaluate", "compare"])
def test_flags_reach_the_command_as_the_script_has_them(command: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"])
    assert shown.exit_code == 0 and f"usage: root {command} " in " ".join(shown.stdout.split())


def test_what_the_command_refuses_ends_in_its_code(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["verify", str(tmp_path), str(tmp_path)])
    assert shown.exit_code == 2
