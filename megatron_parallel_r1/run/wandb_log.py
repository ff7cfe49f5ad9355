"""The metrics of a stage on Weights & Biases, if the recipe asks for it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from megatron_parallel_r1.config.recipe import Recipe
from megatron_parallel_r1.errors import UserError


class Board(Protocol):
    def log(self, record: Mapping[str, Any]) -> None: ...


class _Nowhere:
    def log(self, record: Mapping[str, Any]) -> None:
        return None


class _Wandb:
    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, record: Mapping[str, Any]) -> None:
        numbers = {
            f"{record['kind']}/{name}": value
            for name, value in record.items()
            if isinstance(value, int | float) and name not in ("step", "steps")
        }
        self._run.log(numbers, step=record["step"])


def check_wandb(recipe: Recipe) -> None:
    """Whether what the recipe asks for is installed.

    Raises:
        UserError: it is not.
    """
    if recipe.wandb is None:
        return
    try:
        import wandb  # noqa: F401
    except ImportError:
        raise UserError(
            "wandb: the recipe asks for it, but it is not installed; `pip install wandb`, or leave it out"
        ) from None


@contextmanager
def open_wandb(recipe: Recipe, stage: str, folder: Path) -> Iterator[Board]:
    """Where a stage's records go beside its files; a stage that goes on continues the run that it began.

    Args:
        folder: of the stage; what is logged offline lies in it.
    """
    if recipe.wandb is None:
        yield _Nowhere()
        return
    import wandb

    # Of the folder too: a run begun anew elsewhere is another one.
    told = hashlib.sha256(f"{folder.resolve()}/{recipe.seed}".encode()).hexdigest()[:16]
    run = wandb.init(
        project=recipe.wandb.project,
        entity=recipe.wandb.entity,
        mode=recipe.wandb.mode,
        name=f"{recipe.name}/{stage}",
        group=recipe.name,
        id=told,
        resume="allow" if recipe.wandb.mode == "online" else None,
        dir=str(folder),
        settings=wandb.Settings(silent=True),
        config=recipe.model_dump(mode="json"),
    )
    try:
        yield _Wandb(run)
    finally:
        run.finish()
