"""Logs the steps of a stage: metrics, sampled traces, progress; on rank zero only.

The schemas of the records are in `docs/architecture.md`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from megatron_parallel_r1.config.recipe import Recipe
from megatron_parallel_r1.config.stages import AnyStage
from megatron_parallel_r1.report.progress import StageProgress
from megatron_parallel_r1.run.exporter import Exporter
from megatron_parallel_r1.run.folder import EVALUATIONS, steps_done
from megatron_parallel_r1.run.scalars import scalars
from megatron_parallel_r1.run.wandb_log import open_wandb
from megatron_parallel_r1.utils.devices import peak_memory_gb
from megatron_parallel_r1.utils.formats import interval
from megatron_parallel_r1.utils.jsonl import JsonlWriter, jsonable
from megatron_parallel_r1.utils.rank import is_rank_zero
from megatron_parallel_r1.utils.timers import throughput


class MetricsWriter:
    """Writes a record per step to `<folder>/metrics.jsonl` and `<folder>/tensorboard/`.

    Only one process of a job may use it.

    Args:
        folder: of the stage, `runs/<name>/<stage>`.
        resume_step: the step of the checkpoint that the run resumes from, whose later records are dropped;
            0 for a new run.
        before: steps of the stages that this one builds on, which TensorBoard's steps include.
    """

    def __init__(self, folder: Path, *, resume_step: int, before: int = 0) -> None:
        self._before = before
        self._lines = JsonlWriter(folder / "metrics.jsonl", through=resume_step)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=before + resume_step + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes a step's record: "step", "kind" and any numbers; NaN becomes null."""
        plain = jsonable(record)
        self._lines.write(plain)
        self.draw(plain["step"], scalars(plain))

    def draw(self, step: int, values: Mapping[str, float]) -> None:
        """Adds points to TensorBoard alone."""
        for name, value in values.items():
            self._board.add_scalar(name, value, self._before + step)
        self._board.flush()

    def draw_histograms(self, kind: str, step: int, histograms: Mapping[str, Sequence[float]]) -> None:
        """Adds the distribution of each of these values to TensorBoard alone."""
        for name, values in histograms.items():
            self._board.add_histogram(f"{kind}/{name}", np.array(values, float), self._before + step)

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
            stage.name,
            stage.steps,
            done=done,
            console=Console(quiet=not self._writes),
            steps_after=recipe.work_after(stage),
        )
        before = sum(
            steps_done(folder.parent, other) or other.steps for other in recipe.trained_before(stage)
        )
        if self._writes:
            if stage.evaluation_sets:
                writer = JsonlWriter(folder / EVALUATIONS, through=done if resumes else -1)
                self._evaluations = self._open.enter_context(writer)
            self._metrics = self._open.enter_context(MetricsWriter(folder, resume_step=done, before=before))
            self._traces = self._open.enter_context(JsonlWriter(folder / "traces.jsonl", through=done))
            self._wandb = self._open.enter_context(open_wandb(recipe, stage.name, folder, before))

    def step(
        self,
        step: int,
        metrics: dict[str, Any],
        traces: Sequence[dict[str, Any]] = (),
        histograms: Mapping[str, Sequence[float]] = MappingProxyType({}),
    ) -> None:
        """Logs the metrics of a finished step.

        Args:
            traces: records to keep for the report.
            histograms: values whose distributions TensorBoard and Weights & Biases show, by name.
        """
        if not self._writes:
            return
        record = self._heading | {"step": step, "steps": self._steps} | metrics
        self._metrics.write(record)
        self._metrics.draw_histograms(record["kind"], step, histograms)
        self._wandb.log(record, traces, histograms)
        self._exporter.update(jsonable(record))
        for trace in traces:
            self._traces.write({"stage": self._heading["stage"], "step": step, **trace})
        self.progress.update(step, record | throughput(record) | {"memory_gb": peak_memory_gb()})

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
