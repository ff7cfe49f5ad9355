"""The plot of an evaluation: a panel for each benchmark, in it a row for each checkpoint."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from megatron_parallel_r1.evaluation.summary import EvaluationSummary

# Okabe and Ito's colours, which are safe for colour-blind readers, each with its own marker.
STYLES = (("#0072b2", "o"), ("#d55e00", "s"), ("#009e73", "D"), ("#cc79a7", "^"), ("#000000", "v"))
_SPREAD = 0.56  # of a row's height, over which its modes are placed
_NAME_WIDTH = 30  # characters of a line of a name

Row = tuple[str, int | None]
"""A checkpoint and its training steps."""


def draw_plot(summaries: Sequence[EvaluationSummary]) -> Figure:
    """Draws each checkpoint's score by mode, with its interval; hollow: the share of responses with blocks.

    Rows are in the order of `summaries`, which is that of training steps where these are known.
    """
    names = list(dict.fromkeys(summary.benchmark for summary in summaries))
    modes = list(dict.fromkeys(summary.mode for summary in summaries))
    columns = min(2, len(names))
    lines = -(-len(names) // columns)
    rows = max(len(checkpoints(summaries, name)) for name in names)
    height = 0.9 + rows * max(0.42, 0.17 * len(modes) + 0.12)
    figure = Figure(figsize=(6.4 * columns, height * lines + 0.4), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten().tolist()
    for name, axes in zip(names, panels, strict=False):
        _panel(axes, name, [summary for summary in summaries if summary.benchmark == name], modes)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    drawn = {label: h for axes in panels for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        drawn.values(), drawn.keys(), loc="outside upper center", ncols=3, fontsize=8, frameon=False
    )
    return figure


def svg_of(figure: Figure) -> str:
    """The figure as an SVG document, the same in every run."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "evaluation"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def checkpoints(summaries: Sequence[EvaluationSummary], benchmark: str) -> list[Row]:
    """The rows of a benchmark's panel, from the top."""
    return list(dict.fromkeys((s.checkpoint, s.step) for s in summaries if s.benchmark == benchmark))


def _panel(axes: Axes, name: str, summaries: Sequence[EvaluationSummary], modes: Sequence[str]) -> None:
    rows = checkpoints(summaries, name)
    for index, mode in enumerate(modes):
        colour, marker = STYLES[index % len(STYLES)]
        shift = _SPREAD * (index / (len(modes) - 1) - 0.5) if len(modes) > 1 else 0.0
        chosen = [summary for summary in summaries if summary.mode == mode]
        if not chosen:
            continue
        y = [rows.index((s.checkpoint, s.step)) + shift for s in chosen]
        x = [s.score.value for s in chosen]
        reach = [
            [s.score.value - s.score.low for s in chosen],
            [s.score.high - s.score.value for s in chosen],
        ]
        axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.35)
        axes.errorbar(
            x, y, xerr=reach, color=colour, fmt=marker, markersize=5, capsize=2.5, label=_literal(mode)
        )
        if any(s.parallel_ratio for s in chosen):
            ratios = [s.parallel_ratio for s in chosen]
            label = f"{_literal(mode)}: with blocks"
            axes.plot(
                ratios,
                y,
                color=colour,
                linestyle="",
                marker=marker,
                markersize=7,
                fillstyle="none",
                label=label,
            )
    axes.set_title(_literal(name), fontsize=10, loc="left")
    axes.set_xlim(-0.02, 1.02)
    axes.xaxis.set_major_formatter(PercentFormatter(1, 0))
    axes.grid(True, axis="x", alpha=0.3)
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_yticks(range(len(rows)), [_label(*row) for row in rows], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _label(name: str, step: int | None) -> str:
    lines = textwrap.wrap(name, _NAME_WIDTH)
    short = "\n".join(lines[:2]) + ("…" if len(lines) > 2 else "")
    return _literal(short) if step is None else f"{_literal(short)}\n{step:,} steps"


def _literal(text: str) -> str:
    """A name in which Matplotlib reads no formula."""
    return text.replace("$", r"\$")
