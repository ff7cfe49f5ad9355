"""Logs the metrics of a stage to Weights & Biases, if the recipe enables it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_parallel_r1.config.recipe import Recipe
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.run.folder import RunState
from megatron_parallel_r1.run.scalars import scalars


class WandbLog:
    """Logs step records to a Weights & Biases run; with None for a run, does nothing."""

    def __init__(self, run: Any | None) -> None:
        self._run = run

    def log(self, record: Mapping[str, Any]) -> None:
        """Logs the numbers of a record."""
        if self._run is not None:
            self._run.log(scalars(record), step=record["step"])


def check_wandb(recipe: Recipe) -> None:
    """Checks that wandb is installed if the recipe enables it.

    Raises:
        UserError: it is missing.
    """
    if recipe.wandb is None:
        return
    try:
        import wandb  # noqa: F401
    except ImportError:
        raise UserError(
            "wandb: the recipe enables it, but it is not installed; `pip install wandb`, or remove the key"
        ) from None


@contextmanager
def open_wandb(recipe: Recipe, stage: str, folder: Path) -> Iterator[WandbLog]:
    """Opens the Weights & Biases run of a stage; a resumed stage continues its run.

    Args:
        folder: the stage's folder, where offline runs are written.
    """
    if recipe.wandb is None:
        yield WandbLog(None)
        return
    import wandb

    # Folders of earlier releases have no id.
    run = RunState.read(folder.parent).id or str(folder.parent.resolve())
    try:
        wandb_run = wandb.init(
            project=recipe.wandb.project,
            entity=recipe.wandb.entity,
            mode=recipe.wandb.mode,
            name=f"{recipe.name}/{stage}",
            group=recipe.name,
            id=hashlib.sha256(f"{run}/{stage}/{recipe.seed}".encode()).hexdigest()[:16],
            resume="allow" if recipe.wandb.mode == "online" else None,
            dir=str(folder),
            settings=wandb.Settings(silent=True),
            config=recipe.model_dump(mode="json"),
        )
    except wandb.errors.Error as error:
        raise UserError(f"wandb: {error}; run `wandb login`, or set wandb.mode=offline") from None
    try:
        yield WandbLog(wandb_run)
    finally:
        wandb_run.finish()
