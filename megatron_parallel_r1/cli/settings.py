"""Commands that describe the settings: schema."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Settings")(schema)


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
