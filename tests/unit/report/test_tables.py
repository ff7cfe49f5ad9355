"""The evaluation table in its two forms."""

from __future__ import annotations

import io
from math import nan

import pytest
from rich.console import Console

from megatron_parallel_r1.report.evaluation_table import evaluation_table, latest_evals
from megatron_parallel_r1.utils import formats
from tests.unit.report.synthetic import evals


def test_markdown_has_a_row_for_each_evaluation() -> None:
    lines = evaluation_table(evals()).markdown().splitlines()
    assert len(lines) == 2 + 4
    assert {line.count("|") for line in lines} == {11}
    assert lines[-1] == (
        "| rl_hard | 120 | isolated | 64.2 [60.0, 68.4] % | 93.4 % | 99.1 % | 1.42 | 92.4 | 29.3 | 512 |"
    )


def test_what_is_unknown_is_a_dash_and_a_bar_does_not_break_the_row() -> None:
    row = evaluation_table([{"stage": "a|b", "step": 3}]).markdown().splitlines()[-1]
    assert row == "| a\\|b | 3 | – | – | – | – | – | – | – | – |"


def test_without_blocks_no_share_of_them_is_well_formed() -> None:
    row = evaluation_table(evals()[:1]).markdown().splitlines()[-1]
    assert row.startswith("| arithmetic | 250 | sequential | 8.3 [5.9, 10.7] % | 0.0 % | – | 0.00 |")


def test_an_interval_need_not_be_symmetric() -> None:
    bounds = {"accuracy": 0.0, "ci95": 0.057, "ci95_low": 0.0, "ci95_high": 0.114}
    row = evaluation_table([evals()[0] | bounds]).markdown().splitlines()[-1]
    assert "| 0.0 [0.0, 11.4] % |" in row
    old = {"accuracy": 0.01, "ci95": 0.02}
    assert "| 1.0 [0.0, 3.0] % |" in evaluation_table([evals()[0] | old]).markdown()
    none = {"accuracy": 0.0, "ci95": 0.0, "problems": 30}
    single = {"accuracy": 1.0, "ci95": nan, "problems": 1}
    assert "| 0.0 [0.0, 11.4] % |" in row
    old = {"accuracy": 0.01, "ci95": 0.02}
    assert "| 1.0 [0.0, 3.0] % |" in evaluation_table([evals()[0] | old]).markdown()
    none, single = (
        {"accuracy": 0.0, "ci95": 0.0, "problems": 30},
        {"accuracy": 1.0, "ci95": nan, "problems": 1},
    )
    assert "| 0.0 [0.0, 11.4] % |" in evaluation_table([evals()[0] | none]).markdown()
    assert "| 100.0 [20.7, 100.0] % |" in evaluation_table([evals()[0] | single]).markdown()


def test_the_last_of_several_evaluations_of_one_step_counts() -> None:
    first, *others = evals()
    again = first | {"accuracy": 0.5}
    assert latest_evals([first, *others, again]) == [again, *others]


def test_terminal_table_shows_markup_as_text() -> None:
    console = Console(file=io.StringIO(), width=160)
    console.print(evaluation_table([evals()[-1] | {"stage": "[bold]x[/bold]"}]).terminal())
    text = console.file.getvalue()
    assert "[bold]x[/bold]" in text and "64.2 [60.0, 68.4] %" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.0, "0"), (0.02134, "0.0213"), (1240.2, "1,240"), (3.2e-6, "3.2e-6"), (-2.412, "-2.41")],
)
def test_numbers(value: float | None, text: str) -> None:
    assert formats.number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "–"), (11.6, "12 s"), (245, "4 min 05 s"), (12_000, "3 h 20 min")]
)
def test_durations(seconds: float | None, text: str) -> None:
    assert formats.duration(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(980, "980"), (12_300, "12.3 k"), (3_010_000, "3.01 M")])
def test_counts(value: int, text: str) -> None:
    assert formats.count(value) == text
