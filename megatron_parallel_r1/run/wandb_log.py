"""Logs a run to Weights & Biases, if the recipe enables it: one run for all stages of a curriculum."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_parallel_r1.config.recipe import Recipe
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.run.folder import RunState
from megatron_parallel_r1.run.scalars import scalars

TRACE_COLUMNS = ("step", "problem", "answer", "extracted", "correct", "reward", "response")
# Rows of a table of traces; wandb uploads each table whole.
TABLE_ROWS = 64
# The horizontal axis. wandb's own step may never go back, as it would where two stages start from one, or
# where a run resumes behind its last record.
STEP = "curriculum_step"


class WandbLog:
    """Logs the records of a stage to a Weights & Biases run; with None for a run, does nothing.

    Args:
        before: steps of the stages that the stage builds on; steps are counted over all.
    """

    def __init__(self, run: Any | None, stage: str, before: int) -> None:
        self._run, self._stage, self._before = run, stage, before
        self._rows: list[list[Any]] = []

    def log(
        self,
        record: Mapping[str, Any],
        traces: Sequence[Mapping[str, Any]] = (),
        histograms: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """Logs the numbers of a record, distributions of its traces, and now and then a table of traces."""
        if self._run is None:
            return
        import wandb

        step = {STEP: self._before + record["step"]}
        drawn = {
            f"{record['kind']}/{name}_histogram": wandb.Histogram(list(values))
            for name, values in (histograms or {}).items()
        }
        self._run.log({**scalars(record), **drawn, "stage": self._stage, **step})
        self._rows += [_row(record["step"], trace) for trace in traces]
        if len(self._rows) >= TABLE_ROWS:
            self.flush()

    def flush(self) -> None:
        """Logs the traces that no table has yet."""
        if self._run is None or not self._rows:
            return
        import wandb

        table = wandb.Table(columns=list(TRACE_COLUMNS), data=self._rows)
        self._run.log({f"traces/{self._stage}": table})
        self._rows = []


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
def open_wandb(recipe: Recipe, stage: str, folder: Path, before: int) -> Iterator[WandbLog]:
    """Opens the Weights & Biases run of a curriculum for one of its stages.

    Every stage, and every resumed stage, continues the run of the same id; a fresh run has another one.

    Args:
        folder: the stage's; offline runs are written beside it, into the run's `wandb/`.
        before: steps of the stages that it builds on.
    """
    if recipe.wandb is None:
        yield WandbLog(None, stage, before)
        return
    import wandb

    # Folders of earlier releases have no id.
    run = RunState.read(folder.parent).id or str(folder.parent.resolve())
    try:
        wandb_run = wandb.init(
            project=recipe.wandb.project,
            entity=recipe.wandb.entity,
            mode=recipe.wandb.mode,
            name=recipe.name,
            group=recipe.name,
            id=recipe.wandb.id or hashlib.sha256(f"{run}/{recipe.seed}".encode()).hexdigest()[:16],
            resume="allow" if recipe.wandb.mode == "online" else None,
            dir=str(folder.parent),
            settings=wandb.Settings(silent=True),
            config=recipe.model_dump(mode="json"),
        )
    except wandb.errors.Error as error:
        raise UserError(f"wandb: {error}; run `wandb login`, or set wandb.mode=offline") from None
    wandb_run.define_metric("*", step_metric=STEP)
    log = WandbLog(wandb_run, stage, before)
    try:
        yield log
    finally:
        log.flush()
        wandb_run.finish()


def _row(step: int, trace: Mapping[str, Any]) -> list[Any]:
    """The values of `TRACE_COLUMNS`; paths and summaries are marked in the response."""
    response = []
    for part in trace["text_parts"]:
        if part["kind"] == "text":
            response.append(part["text"])
            continue
        response += [f"[path {number}] {path['text']}" for number, path in enumerate(part["paths"], start=1)]
        response.append(f"[summary] {part['summary'] or ''}")
    return [step, *(trace.get(name) for name in TRACE_COLUMNS[1:-1]), "\n".join(response)]
