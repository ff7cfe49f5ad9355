"""The charts of a page as data, for one run or several; `templates/charts.js` draws them.

Shapes: N points of one stage.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from markupsafe import Markup

from megatron_parallel_r1.report.panels import GROUPS, Kind, Panel
from megatron_parallel_r1.report.run_folder import RunFiles
from megatron_parallel_r1.report.series import (
    Series,
    StageSpan,
    eval_points,
    evaluation_series,
    evaluation_sets,
    series,
    spans,
)
from megatron_parallel_r1.utils.formats import number, percent
from megatron_parallel_r1.utils.rounding import EXACT

COLOURS = 8  # of the page, one for each run or line


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart.

    Attributes:
        summary: first and last value in words, for screen readers.
        data: what the script draws, as JSON takes it.
    """

    panel: Panel
    summary: str
    data: dict[str, Any]

    @property
    def smoothed(self) -> bool:
        return any("smooth" in line for line in self.data["lines"])

    @property
    def has_evals(self) -> bool:
        return bool(self.data["evals"])


@dataclass(frozen=True, slots=True)
class ChartGroup:
    """Charts under one heading."""

    title: str
    charts: tuple[Chart, ...]


@dataclass(frozen=True, slots=True)
class PageCharts:
    """All charts of a page with data; `json` is what the script reads, escaped for a `<script>` element."""

    groups: tuple[ChartGroup, ...]
    json: Markup

    @property
    def all(self) -> tuple[Chart, ...]:
        return tuple(chart for group in self.groups for chart in group.charts)


def page_charts(runs: Sequence[RunFiles]) -> PageCharts:
    """The charts that have data in at least one of `runs`."""
    builder = _Builder(runs)
    groups = []
    for group in GROUPS:
        charts = [chart for panel in group.panels if (chart := builder.chart(panel)) is not None]
        if charts:
            groups.append(ChartGroup(group.title, tuple(charts)))
    content = {
        "runs": [run.name for run in runs],
        "xs": list(builder.columns),
        "stages": builder.stages,
        "charts": [chart.data for group in groups for chart in group.charts],
    }
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return PageCharts(tuple(groups), Markup(text.replace("<", "\\u003c")))


@dataclass
class _Builder:
    """Builds charts; `columns` has each distinct list of steps once, by its place in the page's `xs`."""

    runs: Sequence[RunFiles]
    columns: dict[tuple[int, ...], int] = field(default_factory=dict)
    spans: dict[Kind, list[tuple[StageSpan, ...]]] = field(default_factory=dict)

    @cached_property
    def keys(self) -> frozenset[str]:
        """Names of all metrics."""
        return frozenset(k for run in self.runs for stage in run.stages for row in stage.metrics for k in row)

    @property
    def stages(self) -> dict[Kind, list[list[tuple[str, int, int]]]]:
        """By kind and run: name, start and stop of each stage."""
        return {
            kind: [[(span.stage, span.start, span.stop) for span in of_run] for of_run in by_run]
            for kind, by_run in self.spans.items()
        }

    def chart(self, panel: Panel) -> Chart | None:
        if panel.kind not in self.spans:
            self.spans[panel.kind] = [spans(run, panel.kind) for run in self.runs]
        by_run = self.spans[panel.kind]
        panel = panel.with_prefixed(self.keys)
        curves = [
            (index, label, data)
            for index, run in enumerate(self.runs)
            for label, data in _curves(run, panel, by_run[index])
        ]
        if not curves:
            return None
        labels = list(dict.fromkeys(label for _, label, _ in curves))
        lines = [self._line(index, labels.index(label), data) for index, label, data in curves]
        evals = [
            {
                "run": index,
                "x": point.x,
                "bounds": [_short(point.low), _short(point.y), _short(point.high)],
                "label": point.label,
            }
            for index, run in enumerate(self.runs)
            for point in eval_points(run, panel.eval_key, by_run[index])
        ]
        data: dict[str, Any] = {
            "title": panel.title,
            "kind": panel.kind,
            "scale": panel.scale,
            "labels": labels,
            "lines": lines,
            "evals": evals,
        }
        if panel.scale == "log":
            data["rounding"] = _rounding(self.runs)
        return Chart(panel, _in_words(panel, labels, curves), data)

    def _line(self, run: int, label: int, data: Series) -> dict[str, Any]:
        steps = tuple(int(x) for x in data.x_N)
        line: dict[str, Any] = {
            "run": run,
            "label": label,
            "x": self.columns.setdefault(steps, len(self.columns)),
            "y": _shorts(data.y_N),
        }
        if data.smooth_N is not None:
            line["smooth"] = _shorts(data.smooth_N)
        if data.bounds_N2 is not None:
            line["low"], line["high"] = (_shorts(bound_N) for bound_N in data.bounds_N2.T)
        return line


def _curves(run: RunFiles, panel: Panel, stages: Sequence[StageSpan]) -> Iterable[tuple[str, Series]]:
    """Label and data of each line in each stage."""
    if panel.kind == "evaluation":
        for chosen in evaluation_sets(run):
            label = ", ".join(filter(None, chosen)) or "evaluation"
            for span in stages:
                data = evaluation_series(run, span, panel.lines[0].key, chosen)
                if data is not None:
                    yield label, data
        return
    for line in panel.lines:
        for span in stages:
            if (data := series(run, span, line)) is not None:
                yield line.label, data


def _rounding(runs: Sequence[RunFiles]) -> float:
    """The largest difference that rounding explains, by dtype, depth and temperature of the runs."""
    limits = [row.get("mismatch_rounding") for run in runs for stage in run.stages for row in stage.metrics]
    return max((limit for limit in limits if limit is not None), default=EXACT)


def _in_words(panel: Panel, labels: Sequence[str], curves: Sequence[tuple[int, str, Series]]) -> str:
    words = []
    for label in labels:
        values = [y for run, other, data in curves if (run, other) == (0, label) for y in data.y_N]
        finite = [value for value in values if math.isfinite(value)]
        if finite:
            words.append(f"{label} from {_read(panel, finite[0])} to {_read(panel, finite[-1])}")
    return f"{panel.title}: {', '.join(words)}"


def _read(panel: Panel, value: float) -> str:
    return percent(value) if panel.scale == "share" else number(value)


def _shorts(values: Iterable[float]) -> list[float | int | None]:
    return [_short(value) for value in values]


def _short(value: float) -> float | int | None:
    """Four significant digits; None for what is not finite."""
    if not math.isfinite(value):
        return None
    short = float(f"{value:.4g}")
    return int(short) if short.is_integer() else short
