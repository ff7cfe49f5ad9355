"""Scores of several checkpoints over training steps, a panel for each benchmark."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from megatron_parallel_r1.evaluation.summary import EvaluationSummary

# Okabe and Ito's colours, which are safe for colour-blind readers, each with its own marker.
STYLES = (("#0072b2", "o"), ("#d55e00", "s"), ("#009e73", "D"), ("#cc79a7", "^"), ("#000000", "v"))
_DODGE = 0.008  # shift in axis widths, so that intervals of several modes do not overlap


def draw_plot(summaries: Sequence[EvaluationSummary]) -> Figure:
    """One panel for each benchmark: the score of each mode with its interval; dotted: its parallel ratio.

    The x axis is training steps; checkpoints whose steps are unknown or equal are placed in their order.
    """
    names = list(dict.fromkeys(summary.benchmark for summary in summaries))
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(4.8 * columns, 3.6 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten().tolist()
    for name, axes in zip(names, panels, strict=False):
        _panel(axes, name, [summary for summary in summaries if summary.benchmark == name])
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    return figure


def save_plot(figure: Figure, file: Path) -> None:
    """As PNG or SVG, by the file's ending."""
    figure.savefig(file, dpi=150)


def svg_of(figure: Figure) -> str:
    """The figure as an SVG document, the same in every run."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "evaluation"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def places(summaries: Sequence[EvaluationSummary]) -> tuple[dict[tuple[str, int | None], float], bool]:
    """The position of each checkpoint on the axis, and whether positions are training steps."""
    ordered = list(dict.fromkeys((summary.checkpoint, summary.step) for summary in summaries))
    steps = {step for _, step in ordered}
    if None not in steps and len(steps) == len(ordered):
        return {(name, step): float(step or 0) for name, step in ordered}, True
    return {key: float(index) for index, key in enumerate(ordered)}, False


def _panel(axes: Axes, name: str, summaries: Sequence[EvaluationSummary]) -> None:
    x_of, by_steps = places(summaries)
    width = (max(x_of.values()) - min(x_of.values())) or 1.0
    modes = list(dict.fromkeys(summary.mode for summary in summaries))
    for index, mode in enumerate(modes):
        colour, marker = STYLES[index % len(STYLES)]
        shift = _DODGE * width * (index - (len(modes) - 1) / 2)
        chosen = sorted((s for s in summaries if s.mode == mode), key=lambda s: x_of[s.checkpoint, s.step])
        x = [x_of[s.checkpoint, s.step] + shift for s in chosen]
        scores = [s.score for s in chosen]
        y = [s.value for s in scores]
        reach = [
            [s.score.value - s.score.low for s in chosen],
            [s.score.high - s.score.value for s in chosen],
        ]
        axes.errorbar(x, y, yerr=reach, color=colour, marker=marker, markersize=5, capsize=3, label=mode)
        if any(s.parallel_ratio for s in chosen):
            ratios = [s.parallel_ratio for s in chosen]
            axes.plot(x, ratios, color=colour, linestyle=":", linewidth=1.2, label=f"{mode}: with blocks")
    axes.set_title(name.replace("$", r"\$"), fontsize=10)
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1, 0))
    axes.grid(True, axis="y", alpha=0.3)
    axes.set_xlim(min(x_of.values()) - 0.08 * width, max(x_of.values()) + 0.08 * width)
    axes.set_xticks(list(x_of.values()), [_label(name, step, by_steps) for name, step in x_of], fontsize=8)
    axes.set_xlabel("training steps" if by_steps else "checkpoint", fontsize=9)
    axes.legend(fontsize=7.5, framealpha=0.8)


def _label(name: str, step: int | None, by_steps: bool) -> str:
    label = name.replace("$", r"\$")
    return f"{step:,}\n{label}" if by_steps else label
