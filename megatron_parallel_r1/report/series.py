"""The data of a report's curves: stages on one axis, thinned for a small chart.

Shapes: N points of one stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_parallel_r1.report.evaluation_table import accuracy_interval
from megatron_parallel_r1.report.panels import Kind, Line
from megatron_parallel_r1.report.run_folder import RunFiles
from megatron_parallel_r1.utils.jsonl import JsonRecord

MOST_POINTS = 300
SMOOTH_FROM = 24


@dataclass(frozen=True, slots=True)
class StageSpan:
    """A stage's range of the axis: its step s is at `start + s`."""

    stage: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Series:
    """One metric over one stage; `x_N` is on the joined axis, NaN stands for null.

    `smooth_N` is its moving average, `bounds_N2` its interval; None: without.
    """

    x_N: np.ndarray
    y_N: np.ndarray
    smooth_N: np.ndarray | None = None
    bounds_N2: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class EvalPoint:
    """An evaluation on the joined axis; `low` and `high` bound its interval and equal `y` where unknown."""

    x: int
    y: float
    low: float
    high: float
    label: str


def spans(run: RunFiles, kind: Kind) -> tuple[StageSpan, ...]:
    """The stages of a kind, or those with evaluations of their own, end to end."""
    joined: list[StageSpan] = []
    start = 0
    for stage in run.stages:
        if stage.evaluations if kind == "evaluation" else stage.kind == kind:
            last = max([stage.last_step, *(record["step"] for record in stage.evaluations)])
            joined.append(StageSpan(stage.name, start, start + last))
            start += last
    return tuple(joined)


def series(run: RunFiles, span: StageSpan, line: Line) -> Series | None:
    """A stage's curve; None if all of it is null."""
    rows = [row for row in run.stage(span.stage).metrics if line.key in row]
    x_N = np.array([span.start + row["step"] for row in rows], dtype=float)
    y_N = np.array([_value(row, line) for row in rows], dtype=float)
    if not np.isfinite(y_N).any():
        return None
    x_N, y_N = _thin(x_N, y_N, line.reduce)
    smooths = line.smooth and line.reduce == "mean" and len(y_N) >= SMOOTH_FROM
    return Series(x_N, y_N, _smooth(y_N) if smooths else None)


def evaluation_sets(run: RunFiles) -> tuple[tuple[str, str], ...]:
    """Set and mode of the evaluations inside stages, in the order of the first ones."""
    records = [record for stage in run.stages for record in stage.evaluations]
    return tuple(dict.fromkeys((str(r.get("set", "")), str(r.get("mode", ""))) for r in records))


def evaluation_series(run: RunFiles, span: StageSpan, key: str, chosen: tuple[str, str]) -> Series | None:
    """A metric of one set and mode over a stage, with its interval where the records have one."""
    rows = {
        record["step"]: record
        for record in run.stage(span.stage).evaluations
        if (str(record.get("set", "")), str(record.get("mode", ""))) == chosen and record.get(key) is not None
    }
    if not rows:
        return None
    ordered = [rows[step] for step in sorted(rows)]
    bounds = [(row.get(f"{key}_low"), row.get(f"{key}_high")) for row in ordered]
    known = all(low is not None and high is not None for low, high in bounds)
    return Series(
        np.array([span.start + row["step"] for row in ordered], dtype=float),
        np.array([row[key] for row in ordered], dtype=float),
        bounds_N2=np.array(bounds, dtype=float) if known else None,
    )


def eval_points(run: RunFiles, key: str | None, stages: Sequence[StageSpan]) -> tuple[EvalPoint, ...]:
    """Evaluations of whole stages on a panel's axis, in the mode of the run's last one.

    An evaluation after an earlier stage (after SFT, on a panel of RL) is drawn where the panel's next stage
    begins; the last of several at one place counts.
    """
    if key is None or not run.evals:
        return ()
    mode = run.evals[-1].get("mode")
    points: dict[int, EvalPoint] = {}
    for record in run.evals:
        x = _place(run, stages, record["stage"], record["step"])
        y = record.get(key)
        if x is not None and y is not None and record.get("mode") == mode:
            bounds = accuracy_interval(record) if key == "accuracy" else None
            low, high = bounds or (y, y)
            points[x] = EvalPoint(x, y, low, high, f"{record['stage']}, step {record['step']}")
    return tuple(points[x] for x in sorted(points))


def _place(run: RunFiles, stages: Sequence[StageSpan], stage: str, step: int) -> int | None:
    order = list(run.last_steps)
    if stage not in order:
        return None
    for span in stages:
        if span.stage == stage:
            return span.start + step
        if order.index(span.stage) > order.index(stage):
            return span.start
    return None


def _value(row: JsonRecord, line: Line) -> float:
    value = row[line.key]
    if value is None or isinstance(value, str):
        return float("nan")
    if line.per is None:
        return float(value)
    whole = row.get(line.per)
    return float(value) / whole if whole else float("nan")


def _thin(x_N: np.ndarray, y_N: np.ndarray, reduce: Literal["mean", "max"]) -> tuple[np.ndarray, np.ndarray]:
    if len(x_N) <= MOST_POINTS:
        return x_N, y_N
    bins = np.array_split(np.arange(len(x_N)), MOST_POINTS)
    return np.array([x_N[bin].max() for bin in bins]), np.array([_over(y_N[bin], reduce) for bin in bins])


def _over(y_N: np.ndarray, reduce: Literal["mean", "max"]) -> float:
    finite = y_N[np.isfinite(y_N)]
    if not len(finite):
        return float("nan")
    return float(finite.max() if reduce == "max" else finite.mean())


def _smooth(y_N: np.ndarray) -> np.ndarray:
    """Centred moving average over a twelfth of the points, without nulls.

    The window halves towards both ends: a steep start keeps its height, a noisy end is still smoothed.
    """
    widest, last = max(2, len(y_N) // 24), len(y_N) - 1
    reaches = [max(widest // 2, min(widest, i, last - i)) for i in range(len(y_N))]
    return np.array(
        [_over(y_N[max(0, i - reach) : i + reach + 1], "mean") for i, reach in enumerate(reaches)]
    )
