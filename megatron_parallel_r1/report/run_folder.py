"""Reads a run folder: stages in order, their metrics, traces and evaluations, and the recipe."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.report.evaluation_table import latest_evals
from megatron_parallel_r1.utils.jsonl import JsonRecord, read_jsonl

STAGE_FILES = ("*/traces.jsonl", "*/eval_traces.jsonl", "*/metrics.jsonl", "*/evaluations.jsonl")


@dataclass(frozen=True, slots=True)
class StageFiles:
    """One stage's files; `metrics` by ascending step, `evaluations` are those inside the stage."""

    name: str
    metrics: tuple[JsonRecord, ...]
    traces: tuple[JsonRecord, ...]
    evaluations: tuple[JsonRecord, ...] = ()

    @property
    def kind(self) -> str:
        return self.metrics[0]["kind"] if self.metrics else ""

    @property
    def last_step(self) -> int:
        return self.metrics[-1]["step"] if self.metrics else 0

    def sum(self, *names: str) -> float:
        """The sum of some metrics over all steps, nulls as 0."""
        return sum(row.get(name) or 0 for row in self.metrics for name in names)


@dataclass(frozen=True, slots=True)
class RunFiles:
    """A run's files; absent ones are empty."""

    name: str
    stages: tuple[StageFiles, ...]
    evals: tuple[JsonRecord, ...]
    config: str
    data: str = ""

    def stage(self, name: str) -> StageFiles:
        return next(stage for stage in self.stages if stage.name == name)

    @property
    def last_steps(self) -> dict[str, int]:
        return {stage.name: stage.last_step for stage in self.stages}


def read_run(folder: Path) -> RunFiles:
    """Reads `folder`.

    Raises:
        UserError: it does not exist, holds no run, or one of its files is malformed.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder; give the folder that holds the run's stages")
    stages = tuple(_read_stage(folder / name) for name in _stage_names(folder))
    evals = tuple(latest_evals(_read_if_there(folder / "eval.jsonl", "stage", "step")))
    text, data = (
        file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        for file in (folder / "config.yaml", folder / "data.md")
    )
    if not (stages or evals or text):
        raise UserError(f"{folder}: no run in this folder (no <stage>/metrics.jsonl, no eval.jsonl)")
    return RunFiles(folder.resolve().name, stages, evals, text, data)


def _read_stage(folder: Path) -> StageFiles:
    metrics = _read_if_there(folder / "metrics.jsonl", "kind", "step")
    traces = [
        trace
        for name in ("traces.jsonl", "eval_traces.jsonl")
        for trace in _read_if_there(folder / name, "step", "text_parts")
    ]
    by_step = {row["step"]: row for row in metrics}
    evaluations = _read_if_there(folder / "evaluations.jsonl", "step")
    ordered = tuple(by_step[step] for step in sorted(by_step))
    return StageFiles(folder.name, ordered, tuple(traces), tuple(evaluations))


def _read_if_there(path: Path, *keys: str) -> Sequence[JsonRecord]:
    records = read_jsonl(path, missing_ok=True)
    for number, record in enumerate(records, 1):
        missing = [key for key in keys if key not in record]
        if missing:
            raise UserError(f"{path}, record {number}: no {' and no '.join(missing)}")
    return records


def _stage_names(folder: Path) -> list[str]:
    """Stages with any of `STAGE_FILES`: in the order of `stages.json`, then others by age of their files."""
    listed = folder / "stages.json"
    names: list[str] = []
    if listed.is_file():
        try:
            names = json.loads(listed.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{listed}: not JSON ({error})") from None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{listed}: expected a list of stage names")
    ages = {
        file.parent.name: file.stat().st_mtime for pattern in STAGE_FILES for file in folder.glob(pattern)
    }
    unlisted = sorted(ages.keys() - set(names), key=lambda name: (ages[name], name))
    return [name for name in names if name in ages] + unlisted
