"""The numbers behind a curve: stages joined on one axis, thinned to what a small chart can show.

Shapes: N points of one stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_parallel_r1.report.panels import Line, Panel
from megatron_parallel_r1.report.run_folder import Run

MOST_POINTS = 240
SMOOTH_FROM = 24


@dataclass(frozen=True, slots=True)
class Span:
    """A stage's place on the axis: its step s lies at `start + s`."""

    stage: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Series:
    """One metric over one stage; `x_N` is on the joined axis, NaN marks a null."""

    x_N: np.ndarray
    y_N: np.ndarray
    smooth_N: np.ndarray | None


@dataclass(frozen=True, slots=True)
class EvalPoint:
    """An evaluation on the joined axis; `ci95` is the half width of its interval, 0 if unknown."""

    x: int
    y: float
    ci95: float
    label: str


def spans(run: Run, panel: Panel) -> tuple[Span, ...]:
    """The stages that a panel shows, end to end: those of its kind that logged one of its metrics."""
    found: list[Span] = []
    start = 0
    for stage in run.stages:
        keys = {line.key for line in panel.lines}
        if stage.kind == panel.kind and any(keys & row.keys() for row in stage.metrics):
            found.append(Span(stage.name, start, start + stage.last_step))
            start += stage.last_step
    return tuple(found)


def series(run: Run, span: Span, line: Line) -> Series | None:
    """A stage's curve; None where all of it is null."""
    stage = next(stage for stage in run.stages if stage.name == span.stage)
    rows = [row for row in stage.metrics if line.key in row]
    x_N = np.array([span.start + row["step"] for row in rows], dtype=float)
    y_N = np.array([_value(row[line.key]) for row in rows], dtype=float)
    if not np.isfinite(y_N).any():
        return None
    x_N, y_N = _thin(x_N, y_N, line.reduce)
    smooth_N = _smooth(y_N) if len(y_N) >= SMOOTH_FROM and line.reduce == "mean" else None
    return Series(x_N, y_N, smooth_N)


def eval_points(run: Run, panel: Panel, shown: tuple[Span, ...]) -> tuple[EvalPoint, ...]:
    """Evaluations that belong on a panel's axis, in the mode of the run's last evaluation.

    One made after an earlier stage (after SFT, on a panel of RL) stands where the next shown stage
    begins; of several at one place the last counts.
    """
    if panel.eval_key is None or not run.evals:
        return ()
    mode = run.evals[-1].get("mode")
    points: dict[int, EvalPoint] = {}
    for record in run.evals:
        x = _place(run, shown, record["stage"], record["step"])
        y = record.get(panel.eval_key)
        if x is not None and y is not None and record.get("mode") == mode:
            half_width = (record.get("ci95") or 0.0) if panel.eval_key == "accuracy" else 0.0
            points[x] = EvalPoint(x, y, half_width, f"{record['stage']}, step {record['step']}")
    return tuple(points[x] for x in sorted(points))


def _place(run: Run, shown: tuple[Span, ...], stage: str, step: int) -> int | None:
    order = list(run.last_steps)
    if stage not in order:
        return None
    for span in shown:
        if span.stage == stage:
            return span.start + step
        if order.index(span.stage) > order.index(stage):
            return span.start
    return None


def _value(value: float | None) -> float:
    return float("nan") if value is None else float(value)


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
    """Centred moving average over a twelfth of the points, nulls left out.

    Towards both ends its reach halves: a steep start keeps its height, a noisy end is not taken at its word.
    """
    widest, last = max(2, len(y_N) // 24), len(y_N) - 1
    reaches = [max(widest // 2, min(widest, i, last - i)) for i in range(len(y_N))]
    return np.array(
        [_over(y_N[max(0, i - reach) : i + reach + 1], "mean") for i, reach in enumerate(reaches)]
    )
