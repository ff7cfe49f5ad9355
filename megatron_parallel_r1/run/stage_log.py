"""Logs the steps of a stage: metrics, sampled traces, progress; on rank zero only."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_parallel_r1.config.recipe import Recipe
from megatron_parallel_r1.config.stages import RlStage, SftStage
from megatron_parallel_r1.report.metrics import MetricsWriter
from megatron_parallel_r1.report.progress import StageProgress
from megatron_parallel_r1.run.wandb_log import open_wandb
from megatron_parallel_r1.utils.jsonl import JsonlWriter
from megatron_parallel_r1.utils.rank import is_rank_zero


class StageLog:
    """The log of one stage, a context manager around its steps.

    Args:
        folder: the stage's folder.
        done: last finished step; records of later steps are dropped.
    """

    def __init__(self, recipe: Recipe, stage: SftStage | RlStage, folder: Path, done: int) -> None:
        self._heading = {"stage": stage.name, "kind": stage.kind}
        self._steps = stage.steps
        self._open = ExitStack()
        self._writes = is_rank_zero()
        if self._writes:
            self._metrics = self._open.enter_context(MetricsWriter(folder, resume_step=done))
            self._traces = self._open.enter_context(JsonlWriter(folder / "traces.jsonl", through=done))
            self._wandb = self._open.enter_context(open_wandb(recipe, stage.name, folder))
            self._progress = StageProgress(stage.name, stage.steps, done=done)

    def step(self, step: int, metrics: dict[str, Any], traces: Sequence[dict[str, Any]] = ()) -> None:
        """Logs the metrics of a finished step and the trace records to keep for the report."""
        if not self._writes:
            return
        record = self._heading | {"step": step, "steps": self._steps} | metrics
        self._metrics.write(record)
        self._wandb.log(record)
        for trace in traces:
            self._traces.write({"stage": self._heading["stage"], "step": step, **trace})
        self._progress.update(step, record)

    def __enter__(self) -> StageLog:
        if self._writes:
            self._open.enter_context(self._progress)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
