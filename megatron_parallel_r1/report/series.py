"""The panels of the report, and the data of their curves: stages on one axis, thinned for a small chart.

A colour is a role, not a value: the page gives each role a light and a dark colour (Okabe and Ito's
colour-blind-safe palette), and the SVG only names it.

Shapes: N points of one stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_parallel_r1.report.evaluation_table import accuracy_interval
from megatron_parallel_r1.report.run_folder import RunFiles

Role = Literal["first", "second"]


@dataclass(frozen=True, slots=True)
class Line:
    """A metric as a curve; steps within one pixel are reduced to their mean or maximum."""

    key: str
    label: str
    role: Role = "first"
    reduce: Literal["mean", "max"] = "mean"


@dataclass(frozen=True, slots=True)
class Panel:
    """One small chart.

    Attributes:
        title: one or two words.
        hint: meaning of the number.
        kind: of its stages, "sft" or "rl".
        unit: label of the y axis.
        scale: "share" is fixed to 0..100 %.
        eval_key: metric of the evaluation records to draw beside the curve.
    """

    title: str
    hint: str
    kind: Literal["sft", "rl"]
    lines: tuple[Line, ...]
    unit: str
    scale: Literal["share", "linear", "log"] = "linear"
    eval_key: str | None = None


PANELS = (
    Panel(
        "Loss of SFT",
        "cross-entropy on the tokens that carry loss",
        "sft",
        (Line("loss", "loss"),),
        "nats per token",
    ),
    Panel("Reward", "mean over the sampled traces", "rl", (Line("reward", "reward"),), "reward"),
    Panel(
        "Accuracy",
        "right final answers among the traces sampled for training",
        "rl",
        (Line("accuracy", "training"),),
        "share right",
        "share",
        "accuracy",
    ),
    Panel(
        "Parallel ratio",
        "traces with at least one parallel block",
        "rl",
        (Line("parallel_ratio", "training"),),
        "share of traces",
        "share",
        "parallel_ratio",
    ),
    Panel(
        "Well-formed",
        "blocks with two closed paths or more and a closed summary",
        "rl",
        (Line("well_formed", "training"),),
        "share of blocks",
        "share",
        "well_formed_blocks",
    ),
    Panel(
        "Place of the first block",
        "where in the trace parallel thinking starts: 0 is its beginning, 1 its end",
        "rl",
        (Line("first_block", "first block"),),
        "relative place",
    ),
    Panel(
        "Mismatch",
        "difference between a token's log-probability at rollout and as the trainer recomputes it",
        "rl",
        (
            Line("mismatch_max", "largest", "first", "max"),
            Line("mismatch_mean", "mean", "second"),
        ),
        "|Δ log p|",
        "log",
    ),
    Panel("Entropy", "of the policy, mean over its tokens", "rl", (Line("entropy", "entropy"),), "nats"),
    Panel(
        "Length",
        "all tokens of a response, and those on its critical path",
        "rl",
        (
            Line("length", "response"),
            Line("critical_length", "critical path", "second"),
        ),
        "tokens",
    ),
)

MOST_POINTS = 240
SMOOTH_FROM = 24


@dataclass(frozen=True, slots=True)
class StageSpan:
    """A stage's range of the axis: its step s is at `start + s`."""

    stage: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Series:
    """One metric over one stage; `x_N` is on the joined axis, NaN stands for null."""

    x_N: np.ndarray
    y_N: np.ndarray
    smooth_N: np.ndarray | None


@dataclass(frozen=True, slots=True)
class EvalPoint:
    """An evaluation on the joined axis; `low` and `high` bound its interval and equal `y` where unknown."""

    x: int
    y: float
    low: float
    high: float
    label: str


def spans(run: RunFiles, panel: Panel) -> tuple[StageSpan, ...]:
    """The stages of a panel, end to end: those of its kind that logged one of its metrics."""
    joined: list[StageSpan] = []
    start = 0
    for stage in run.stages:
        keys = {line.key for line in panel.lines}
        if stage.kind == panel.kind and any(keys & row.keys() for row in stage.metrics):
            joined.append(StageSpan(stage.name, start, start + stage.last_step))
            start += stage.last_step
    return tuple(joined)


def series(run: RunFiles, span: StageSpan, line: Line) -> Series | None:
    """A stage's curve; None if all of it is null."""
    stage = next(stage for stage in run.stages if stage.name == span.stage)
    rows = [row for row in stage.metrics if line.key in row]
    x_N = np.array([span.start + row["step"] for row in rows], dtype=float)
    y_N = np.array([_value(row[line.key]) for row in rows], dtype=float)
    if not np.isfinite(y_N).any():
        return None
    x_N, y_N = _thin(x_N, y_N, line.reduce)
    smooth_N = _smooth(y_N) if len(y_N) >= SMOOTH_FROM and line.reduce == "mean" else None
    return Series(x_N, y_N, smooth_N)


def eval_points(run: RunFiles, panel: Panel, stages: tuple[StageSpan, ...]) -> tuple[EvalPoint, ...]:
    """Evaluations on a panel's axis, in the mode of the run's last evaluation.

    An evaluation after an earlier stage (after SFT, on a panel of RL) is drawn where the panel's next stage
    begins; the last of several at one place counts.
    """
    if panel.eval_key is None or not run.evals:
        return ()
    mode = run.evals[-1].get("mode")
    points: dict[int, EvalPoint] = {}
    for record in run.evals:
        x = _place(run, stages, record["stage"], record["step"])
        y = record.get(panel.eval_key)
        if x is not None and y is not None and record.get("mode") == mode:
            bounds = accuracy_interval(record) if panel.eval_key == "accuracy" else None
            low, high = bounds or (y, y)
            points[x] = EvalPoint(x, y, low, high, f"{record['stage']}, step {record['step']}")
    return tuple(points[x] for x in sorted(points))


def _place(run: RunFiles, stages: tuple[StageSpan, ...], stage: str, step: int) -> int | None:
    order = list(run.last_steps)
    if stage not in order:
        return None
    for span in stages:
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
    """Centred moving average over a twelfth of the points, without nulls.

    The window halves towards both ends: a steep start keeps its height, a noisy end is still smoothed.
    """
    widest, last = max(2, len(y_N) // 24), len(y_N) - 1
    reaches = [max(widest // 2, min(widest, i, last - i)) for i in range(len(y_N))]
    return np.array(
        [_over(y_N[max(0, i - reach) : i + reach + 1], "mean") for i, reach in enumerate(reaches)]
    )
