"""Figures of made records, worked out by hand; tables, page and plot of them."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from itertools import combinations

import pytest

from megatron_parallel_r1.evaluation.modes import EvaluationMode
from megatron_parallel_r1.evaluation.plot import checkpoints, draw_plot, svg_of
from megatron_parallel_r1.evaluation.presentation import evaluation_tables, html_page, markdown_page
from megatron_parallel_r1.evaluation.records import ResponseRecord
from megatron_parallel_r1.evaluation.summary import (
    BenchmarkResult,
    EvaluationSummary,
    RightShare,
    in_order,
    paired_tests,
    summarise,
)
from megatron_parallel_r1.rewards.verifier import Verifier
from tests.unit.evaluation.made import record

ROUNDING = 1e-12


def problem(name: str, right: int, blocks: int = 0, samples: int = 4) -> list[ResponseRecord]:
    """The first `right` samples are right, and the first `blocks` have a block."""
    return [record_of(name, i, i < right, int(i < blocks)) for i in range(samples)]


def record_of(name: str, sample: int, correct: bool, blocks: int) -> ResponseRecord:
    return record(name, sample, correct, blocks, answer="1" if correct else None)


def result(
    *problems: list[ResponseRecord], checkpoint: str = "one", step: int | None = 10, mode: str = "parallel"
) -> BenchmarkResult:
    with Verifier() as verifier:
        return summarise(checkpoint, step, "made", EvaluationMode.of(mode), problems, verifier)


def test_figures_by_hand() -> None:
    found = result(problem("a", 1, blocks=4), problem("b", 3, blocks=2), problem("c", 0))
    s = found.summary
    assert (s.problems, s.samples, s.votes) == (3, 4, 4)
    assert s.score == s.mean and s.mean.value == pytest.approx(4 / 12, abs=ROUNDING)
    assert {k: round(v.value, 9) for k, v in s.passes.items()} == {
        1: round(1 / 3, 9),
        2: round((3 / 6 + 1 + 0) / 3, 9),  # a: 3 of 6 pairs miss; b: no pair of wrong ones
        4: round(2 / 3, 9),
    }
    # Who gives no answer has no vote: one right answer elects itself.
    assert s.majority.value == pytest.approx(2 / 3, abs=ROUNDING)
    assert s.parallel_ratio == 6 / 12 and s.blocks_per_response == 6 / 12
    assert (s.well_formed, s.paths_per_block) == (1.0, 2.0)
    assert (s.tokens, s.critical_tokens) == (10, (6 * 6 + 6 * 10) / 12)
    assert s.saved == pytest.approx(1 - 96 / 120, abs=ROUNDING)
    assert (s.first_block, s.first_block_token) == (pytest.approx(0.2, abs=ROUNDING), 2)
    assert (s.with_blocks, s.without_blocks) == (RightShare(1 + 2, 6), RightShare(1, 6))
    assert (s.truncated, s.unanswered) == (0, 8 / 12)
    assert (found.scores.right_P, found.scores.of) == ((1, 3, 0), 4)


def test_majority_scores_votes() -> None:
    found = result(problem("a", 1), problem("b", 3), mode="majority@2")
    assert found.summary.votes == 2 and found.summary.score == found.summary.majority
    assert (found.scores.right_P, found.scores.of) == ((1, 2), 2)
    assert found.summary.mean.value == 0.5


def test_without_blocks_there_is_nothing_to_say_of_them() -> None:
    s = result(problem("a", 2)).summary
    assert (s.well_formed, s.paths_per_block, s.first_block, s.first_block_token) == (None,) * 4
    assert s.with_blocks.value is None and s.saved == 0


def test_records_in_the_order_of_problems() -> None:
    flat = problem("b", 1) + problem("a", 2)
    found = {item.key: item for item in reversed(flat)}
    assert in_order(found, [item.key for item in flat], 4) == [flat[:4], flat[4:]]


def four_results() -> list[BenchmarkResult]:
    better = [problem(name, 4, blocks=4) for name in "abcdefgh"]
    worse = [problem(name, 0, blocks=1) for name in "abcdefgh"]
    return [
        result(*worse, checkpoint="begin", step=10),
        result(*worse, checkpoint="begin", step=10, mode="sequential"),
        result(*better, checkpoint="end", step=30),
        result(*worse, checkpoint="end", step=30, mode="sequential"),
    ]


def test_pairs_over_training_and_between_modes() -> None:
    pairs = paired_tests(four_results())
    named = [
        (f"{p.before.checkpoint}/{p.before.mode}", f"{p.after.checkpoint}/{p.after.mode}") for p in pairs
    ]
    assert named == [
        ("begin/parallel", "begin/sequential"),
        ("begin/parallel", "end/parallel"),
        ("begin/sequential", "end/sequential"),
        ("end/parallel", "end/sequential"),
    ]
    assert [p.comparison.p for p in pairs] == [1.0, 2 / 2**8, 1.0, 2 / 2**8]
    assert [p.comparison.difference.value for p in pairs] == [0, 1, 0, -1]
    assert pairs[1].adjusted == 4 * 2 / 2**8


def test_tables_say_the_same_in_markdown_and_html() -> None:
    results = four_results()
    tables = evaluation_tables([r.summary for r in results], paired_tests(results))
    markdown, html = markdown_page(tables), html_page(tables)
    assert [table.title for table in tables] == ["Accuracy", "Thinking in parallel", "Paired tests"]
    assert "| begin, parallel | end, parallel | 8 | +100.0 [+48.4, +100.0] | 0.0078 | 0.031 |" in markdown
    rows = sum(len(table.rows) for table in tables)
    assert html.count("<tr>") == rows + 3 and markdown.count("\n| ") == rows + 6
    for line in markdown.splitlines():
        assert not line.startswith("|") or line.count("|") == line.count(" | ") + 2
    assert "img-src data:" in html and "<script" not in html


def test_names_are_escaped() -> None:
    results = [result(problem("a", 1), checkpoint="<b>|x</b>")]
    tables = evaluation_tables([r.summary for r in results])
    assert "<b>" not in html_page(tables) and "&lt;b&gt;|x" in html_page(tables)
    assert r"<b>\|x</b>" in markdown_page(tables)


def test_summaries_are_plain_json() -> None:
    values = json.loads(json.dumps(asdict(result(problem("a", 1)).summary)))
    assert values["score"]["value"] == 0.25 and values["passes"]["4"]["value"] == 1.0


def summaries() -> list[EvaluationSummary]:
    return [r.summary for r in four_results()]


def test_the_plot_has_a_row_for_each_checkpoint() -> None:
    assert checkpoints(summaries(), "made") == [("begin", 10), ("end", 30)]
    (axes,) = draw_plot(summaries()).axes
    lines = {line.get_label(): line for line in axes.get_lines() if not str(line.get_label()).startswith("_")}
    containers = {c.get_label(): c.lines[0].get_xdata().tolist() for c in axes.containers}
    assert containers == {"parallel": [0.0, 1.0], "sequential": [0.0, 0.0]}
    assert lines["parallel: with blocks"].get_xdata().tolist() == [0.25, 1.0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["begin\n10 steps", "end\n30 steps"]
    svg = svg_of(draw_plot(summaries()))
    assert svg == svg_of(draw_plot(summaries())) and re.match(r"<\?xml", svg)


def test_a_name_in_the_plot_is_no_formula() -> None:
    found = [result(problem("a", 1), checkpoint=name, step=None).summary for name in ("x", "w$", "v")]
    (axes,) = draw_plot(found).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["x", r"w\$", "v"]
    assert ">w$<" in svg_of(draw_plot(found)) or "w$ -->" in svg_of(draw_plot(found))


def test_names_in_the_plot_do_not_overlap() -> None:
    """Close steps and long names, many modes and benchmarks; nothing lies over the data."""
    names = [f"checkpoint of a run with a long name, {number}" for number in range(9)]
    base = [result(problem("a", 1), checkpoint=name, step=1000 + i) for i, name in enumerate(names)]
    found = [
        replace(r.summary, benchmark=benchmark, mode=mode)
        for benchmark in ("gsm8k", "a benchmark with a long name", "aime")
        for mode in ("isolated", "replay", "causal", "sequential")
        for r in base
    ]
    figure = draw_plot(found)
    svg_of(figure)  # lays it out
    panels = [axes for axes in figure.axes if axes.get_visible()]
    boxes = [label.get_window_extent() for axes in panels for label in axes.get_yticklabels()]
    boxes += [axes.title.get_window_extent() for axes in panels]
    boxes += [axes._left_title.get_window_extent() for axes in panels]
    boxes += [axes.get_window_extent() for axes in panels]
    boxes += [legend.get_window_extent() for legend in figure.legends]
    boxes = [box for box in boxes if box.width > 1 and box.height > 1]
    assert [(a, b) for a, b in combinations(boxes, 2) if a.padded(-1).overlaps(b.padded(-1))] == []
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width for box in boxes)
