"""What a stage writes and shows step by step; the first process of a run does it for all."""

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
    """Metrics, kept traces and progress of one stage, used as a context manager around its steps.

    Args:
        folder: of the stage.
        done: steps that it has behind it; what was written beyond them is dropped.
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

    def step(self, step: int, measured: dict[str, Any], traces: Sequence[dict[str, Any]] = ()) -> None:
        """Takes a step that is done, and those of its traces that are kept for the report."""
        if not self._writes:
            return
        record = self._heading | {"step": step, "steps": self._steps} | measured
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
