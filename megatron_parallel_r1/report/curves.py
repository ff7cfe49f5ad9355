"""Draws panels as inline SVG with the page's CSS variables as colours.

Matplotlib writes colours as hex; each role has a unique hex value, which is then replaced by its variable.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from megatron_parallel_r1.report.run_folder import RunFiles
from megatron_parallel_r1.report.series import (
    PANELS,
    EvalPoint,
    Line,
    Panel,
    Series,
    StageSpan,
    eval_points,
    series,
    spans,
)
from megatron_parallel_r1.utils.formats import number, percent
from megatron_parallel_r1.utils.rounding import EXACT

HEX = {
    "ink": "#0a0b01",
    "faint": "#0a0b02",
    "first": "#0a0b03",
    "second": "#0a0b04",
    "eval": "#0a0b05",
    "card": "#0a0b06",
}
WIDTH, HEIGHT = 336, 204  # points, which are the units of the viewBox
LEFT, RIGHT, BOTTOM, TOP = 50, 8, 34, 18
FONT = 9.5
FLOOR = 1e-9  # replaces 0 on a logarithmic axis
RC: dict[Any, object] = {  # the stub allows only literal keys
    "svg.fonttype": "none",
    "font.size": FONT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": HEX["faint"],
    "axes.labelcolor": HEX["ink"],
    "xtick.color": HEX["faint"],
    "ytick.color": HEX["faint"],
    "xtick.labelcolor": HEX["ink"],
    "ytick.labelcolor": HEX["ink"],
    "grid.color": HEX["faint"],
    "grid.alpha": 0.35,
    "grid.linewidth": 0.6,
    "text.color": HEX["ink"],
}


@dataclass(frozen=True, slots=True)
class Curve:
    """A drawn panel.

    Attributes:
        panel: its definition.
        svg: an `<svg>` element.
        summary: first and last value in words, for screen readers.
        points: JSON `[[x, y, label], ...]` in units of the viewBox, for tooltips.
        has_evals: whether evaluations are drawn beside the curve.
        smoothed: whether a moving average is drawn over the steps.
    """

    panel: Panel
    svg: str
    summary: str
    points: str
    has_evals: bool
    smoothed: bool


def draw_curves(run: RunFiles) -> list[Curve]:
    """All panels with data in the run."""
    with matplotlib.rc_context(RC):
        drawn = [_draw(run, panel, spans(run, panel)) for panel in PANELS]
    return [curve for curve in drawn if curve is not None]


def _draw(run: RunFiles, panel: Panel, stages: tuple[StageSpan, ...]) -> Curve | None:
    candidates = [(span, line, series(run, span, line)) for line in panel.lines for span in stages]
    lines = [(span, line, data) for span, line, data in candidates if data is not None]
    if not lines:
        return None
    evals = eval_points(run, panel, stages)
    figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), dpi=72)
    box = (LEFT, BOTTOM, WIDTH - LEFT - RIGHT, HEIGHT - BOTTOM - TOP)
    axes = figure.add_axes((box[0] / WIDTH, box[1] / HEIGHT, box[2] / WIDTH, box[3] / HEIGHT))
    _set_axes(axes, panel, stages)
    for _, line, data in lines:
        _plot(axes, panel, line, data)
    if evals:
        _plot_evals(axes, evals)
    if panel.scale == "log":
        _mark_rounding(axes, run)
    _mark_stages(axes, stages)
    svg = _svg(figure, panel)
    return Curve(
        panel,
        svg,
        _in_words(panel, lines),
        json.dumps(_points(axes, panel, lines, evals), ensure_ascii=False),
        bool(evals),
        any(data.smooth_N is not None for _, _, data in lines),
    )


def _set_axes(axes: Axes, panel: Panel, stages: tuple[StageSpan, ...]) -> None:
    axes.grid(True, axis="y")
    axes.tick_params(length=2.5, pad=2.5)
    axes.set_ylabel(panel.unit, labelpad=3)
    axes.set_xlabel("step, stages joined" if len(stages) > 1 else "step", labelpad=2)
    last = max(1, stages[-1].stop)
    axes.set_xlim(-0.02 * last, 1.02 * last)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if panel.scale == "share":
        axes.set_ylim(-0.02, 1.02)
        axes.set_yticks(np.linspace(0, 1, 5))
        axes.yaxis.set_major_formatter(PercentFormatter(1, 0))
    elif panel.scale == "log":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.margins(y=0.08)


def _plot(axes: Axes, panel: Panel, line: Line, data: Series) -> None:
    y_N = np.maximum(data.y_N, FLOOR) if panel.scale == "log" else data.y_N
    smooth_N = data.smooth_N
    if smooth_N is not None and panel.scale == "log":
        smooth_N = np.maximum(smooth_N, FLOOR)
    colour = HEX[line.role]
    alone = np.isfinite(y_N).sum() == 1
    thin = smooth_N is not None
    axes.plot(
        data.x_N,
        y_N,
        color=colour,
        linewidth=0.8 if thin else 1.6,
        alpha=0.4 if thin else 1,
        marker="o" if alone else None,
        markersize=4,
    )
    if smooth_N is not None:
        axes.plot(data.x_N, smooth_N, color=colour, linewidth=2)


def _plot_evals(axes: Axes, evals: Sequence[EvalPoint]) -> None:
    axes.errorbar(
        [point.x for point in evals],
        [point.y for point in evals],
        yerr=[[p.y - p.low for p in evals], [p.high - p.y for p in evals]],
        fmt="D",
        color=HEX["eval"],
        markersize=6,
        markeredgecolor=HEX["card"],
        markeredgewidth=1,
        elinewidth=1.4,
        capsize=3,
        zorder=4,
        clip_on=False,
    )


def _mark_rounding(axes: Axes, run: RunFiles) -> None:
    """Draws the largest difference that rounding explains, by dtype, depth and temperature of the run."""
    limits = [row.get("mismatch_rounding") for stage in run.stages for row in stage.metrics]
    most = max((limit for limit in limits if limit is not None), default=EXACT)
    axes.axhline(most, color=HEX["ink"], linewidth=0.8, linestyle=(0, (1, 2)))
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, most / 4), max(high, most * 10))
    right = axes.get_yaxis_transform()
    axes.text(1, most * 1.2, "rounding", transform=right, ha="right", va="bottom", size=8)


def _mark_stages(axes: Axes, stages: tuple[StageSpan, ...]) -> None:
    width = max(1, stages[-1].stop)
    for span in stages:
        if span.start:
            axes.axvline(span.start, color=HEX["ink"], linewidth=0.8, alpha=0.6)
        room = int((span.stop - span.start) / width * (WIDTH - LEFT - RIGHT) / (0.56 * FONT))
        name = span.stage if len(span.stage) <= room else span.stage[: max(0, room - 1)] + "…"
        if room >= 4:
            top = axes.get_xaxis_transform()
            axes.text(span.start, 1.03, name.replace("$", r"\$"), transform=top, ha="left", va="bottom")


def _svg(figure: Figure, panel: Panel) -> str:
    # The salt keeps the ids of several drawings on a page distinct, and the same in every run.
    with matplotlib.rc_context({"svg.hashsalt": panel.title}):
        file = io.StringIO()
        nothing = {"Creator": None, "Date": None, "Format": None, "Type": None}
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    for role, colour in HEX.items():
        text = text.replace(colour, f"var(--{role})")
    text = re.sub(r' (xmlns(:\w+)?|version|width|height)="[^"]*"', "", text.split(">", 1)[0]) + (
        ' aria-hidden="true">' + text.split(">", 1)[1]
    )
    return re.sub(r'(id=|href=|url\()("?)(#?)', rf"\1\2\3{_slug(panel)}-", text)


def _slug(panel: Panel) -> str:
    return panel.title.lower().replace(" ", "-")


def _points(
    axes: Axes,
    panel: Panel,
    lines: Sequence[tuple[StageSpan, Line, Series]],
    evals: Sequence[EvalPoint],
) -> list[list[float | str]]:
    points: list[list[float | str]] = []
    for span, line, data in lines:
        several = len(panel.lines) > 1
        for x, y in zip(data.x_N, data.y_N, strict=True):
            if np.isfinite(y):
                height = max(y, FLOOR) if panel.scale == "log" else y
                name = f"{line.label} " if several else ""
                label = f"{span.stage}, step {x - span.start:.0f}: {name}{_read(panel, y)}"
                points.append([*_on_page(axes, x, height), label])
    for point in evals:
        label = f"held-out after {point.label}: {_read(panel, point.y)}"
        points.append([*_on_page(axes, point.x, point.y), label])
    return points


def _on_page(axes: Axes, x: float, y: float) -> tuple[float, float]:
    across, up = axes.transData.transform((x, y))
    return round(float(across), 1), round(HEIGHT - float(up), 1)


def _read(panel: Panel, value: float) -> str:
    return percent(value) if panel.scale == "share" else number(value)


def _in_words(panel: Panel, lines: Sequence[tuple[StageSpan, Line, Series]]) -> str:
    words = []
    for line in panel.lines:
        values = [y for _, other, data in lines if other is line for y in data.y_N if np.isfinite(y)]
        if values:
            words.append(f"{line.label} from {_read(panel, values[0])} to {_read(panel, values[-1])}")
    return f"{panel.title}: {', '.join(words)}"
