"""Logs the steps of a stage: metrics, sampled traces, progress; on rank zero only.

The schemas of the records are in `docs/architecture.md`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from megatron_parallel_r1.config.recipe import Recipe
from megatron_parallel_r1.config.stages import AnyStage
from megatron_parallel_r1.report.progress import StageProgress
from megatron_parallel_r1.run.exporter import Exporter
from megatron_parallel_r1.run.folder import EVALUATIONS
from megatron_parallel_r1.run.scalars import scalars
from megatron_parallel_r1.run.wandb_log import open_wandb
from megatron_parallel_r1.utils.formats import interval
from megatron_parallel_r1.utils.jsonl import JsonlWriter, jsonable
from megatron_parallel_r1.utils.rank import is_rank_zero


class MetricsWriter:
    """Writes a record per step to `<folder>/metrics.jsonl` and `<folder>/tensorboard/`.

    Only one process of a job may use it.

    Args:
        folder: of the stage, `runs/<name>/<stage>`.
        resume_step: the step of the checkpoint that the run resumes from, whose later records are dropped;
            0 for a new run.
    """

    def __init__(self, folder: Path, *, resume_step: int) -> None:
        self._lines = JsonlWriter(folder / "metrics.jsonl", through=resume_step)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes a step's record: "step", "kind" and any numbers; NaN becomes null."""
        plain = jsonable(record)
        self._lines.write(plain)
        self.draw(plain["step"], scalars(plain))

    def draw(self, step: int, values: Mapping[str, float]) -> None:
        """Adds points to TensorBoard alone."""
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()

    def close(self) -> None:
        self._lines.close()
        self._board.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class StageLog:
    """The log of one stage, a context manager around its steps.

    Args:
        folder: the stage's folder.
        done: last finished step; records of later steps are dropped.
        exporter: shows the last record.
        resumes: whether the run resumes; if not, an evaluation before the first step is dropped too.

    Attributes:
        progress: of the stage; silent on ranks other than zero.
    """

    def __init__(
        self,
        recipe: Recipe,
        stage: AnyStage,
        folder: Path,
        done: int,
        exporter: Exporter,
        resumes: bool,
    ) -> None:
        self._heading = {"stage": stage.name, "kind": stage.kind}
        self._steps = stage.steps
        self._open = ExitStack()
        self._exporter = exporter
        exporter.update(self._heading | {"step": done, "steps": stage.steps})
        self._writes = is_rank_zero()
        self.progress = StageProgress(
            stage.name, stage.steps, done=done, console=Console(quiet=not self._writes)
        )
        if self._writes:
            if stage.evaluation_sets:
                writer = JsonlWriter(folder / EVALUATIONS, through=done if resumes else -1)
                self._evaluations = self._open.enter_context(writer)
            self._metrics = self._open.enter_context(MetricsWriter(folder, resume_step=done))
            self._traces = self._open.enter_context(JsonlWriter(folder / "traces.jsonl", through=done))
            self._wandb = self._open.enter_context(open_wandb(recipe, stage.name, folder))

    def step(self, step: int, metrics: dict[str, Any], traces: Sequence[dict[str, Any]] = ()) -> None:
        """Logs the metrics of a finished step and the trace records to keep for the report."""
        if not self._writes:
            return
        record = self._heading | {"step": step, "steps": self._steps} | metrics
        self._metrics.write(record)
        self._wandb.log(record)
        self._exporter.update(jsonable(record))
        for trace in traces:
            self._traces.write({"stage": self._heading["stage"], "step": step, **trace})
        self.progress.update(step, record)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Logs the record of an evaluation."""
        if not self._writes:
            return
        self._evaluations.write(record)
        self._metrics.draw(record["step"], scalars(jsonable(record)))
        self._wandb.log(record)
        figure = interval(*(record[f"accuracy{end}"] for end in ("", "_low", "_high")))
        where = f"{record['stage']}  step {record['step']}  {record['set']} {record['mode']}"
        self.progress.note(f"{where}  accuracy {figure} %, critical path {record['critical_length']:.1f}")

    def __enter__(self) -> StageLog:
        if self._writes:
            self._open.enter_context(self.progress)
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()
