"""Where points of a curve come to lie."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_parallel_r1.report.panels import GROUPS, Line
from megatron_parallel_r1.report.run_folder import RunFiles, StageFiles
from megatron_parallel_r1.report.series import (
    MOST_POINTS,
    StageSpan,
    eval_points,
    series,
    spans,
)

ACCURACY = Line("accuracy", "training")


def _stage(name: str, kind: str, values: list[float | None], key: str = "accuracy") -> StageFiles:
    rows = [{"kind": kind, "step": step, key: value} for step, value in enumerate(values, 1)]
    return StageFiles(name, tuple(rows), ())


def _run(*stages: StageFiles, evals: tuple[dict[str, Any], ...] = ()) -> RunFiles:
    return RunFiles("r", stages, evals, "")


def test_stages_of_a_kind_lie_end_to_end() -> None:
    run = _run(
        _stage("a", "sft", [1.0] * 9, "loss"), _stage("b", "rl", [0.1] * 4), _stage("c", "rl", [0.2] * 3)
    )
    shown = spans(run, "rl")
    assert shown == (StageSpan("b", 0, 4), StageSpan("c", 4, 7))
    data = series(run, shown[1], ACCURACY)
    assert data is not None and data.x_N.tolist() == [5, 6, 7]


def test_a_null_is_a_gap_and_nulls_alone_are_no_curve() -> None:
    run = _run(_stage("b", "rl", [0.1, None, 0.3]), _stage("c", "rl", [None]))
    first, second = (series(run, span, ACCURACY) for span in spans(run, "rl"))
    assert first is not None and np.isnan(first.y_N).tolist() == [False, True, False]
    assert second is None


def test_many_steps_are_thinned_to_their_mean_or_largest() -> None:
    values: list[float | None] = [0.0] * (10 * MOST_POINTS)
    values[77] = 1.0
    run = _run(_stage("b", "rl", values))
    (span,) = spans(run, "rl")
    mean = series(run, span, Line("accuracy", "x"))
    largest = series(run, span, Line("accuracy", "x", reduce="max"))
    assert mean is not None and len(mean.y_N) == MOST_POINTS and np.isclose(mean.y_N.max(), 0.1)
    assert largest is not None and largest.y_N.max() == 1 and largest.smooth_N is None


def test_the_moving_average_follows_a_line_and_calms_noise_at_the_end() -> None:
    values: list[float | None] = [float(i) for i in range(96)]
    values[-1] = 900.0
    run = _run(_stage("b", "rl", values))
    data = series(run, spans(run, "rl")[0], ACCURACY)
    assert data is not None and data.smooth_N is not None
    assert np.allclose(data.smooth_N[4:-5], data.y_N[4:-5])
    assert data.smooth_N[0] == 1 and data.smooth_N[-1] < 400


def test_an_evaluation_stands_at_its_step_or_where_the_next_shown_stage_begins() -> None:
    def record(stage: str, step: int, accuracy: float | None, mode: str = "isolated") -> dict[str, Any]:
        return {"stage": stage, "step": step, "accuracy": accuracy, "ci95": 0.02, "mode": mode}

    run = _run(
        _stage("a", "sft", [1.0] * 9, "loss"),
        _stage("b", "rl", [0.1] * 4),
        _stage("c", "sft", [1.0] * 9, "loss"),
        _stage("d", "rl", [0.1] * 6),
        evals=(
            record("a", 5, 0.1),
            record("a", 9, 0.2),
            record("b", 4, 0.3),
            record("b", 3, None),
            record("c", 9, 0.4),
            record("d", 5, 0.5),
            record("d", 6, 0.9, mode="sequential"),
            record("gone", 6, 0.8),
            record("d", 6, 0.6),
        ),
    )
    points = eval_points(run, "accuracy", spans(run, "rl"))
    assert [(point.x, point.y) for point in points] == [(0, 0.2), (4, 0.4), (9, 0.5), (10, 0.6)]


def test_every_panel_has_a_title_of_its_own_and_something_to_draw() -> None:
    panels = [panel for group in GROUPS for panel in group.panels]
    assert len({panel.title for panel in panels}) == len(panels)
    assert all(panel.lines or panel.prefix for panel in panels)
