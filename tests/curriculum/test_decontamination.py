"""Training problems that overlap with evaluation problems are left out, and the run folder says which."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_parallel_r1.config.reader import read_recipe
from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.run.datasets import check_sources, contamination_report, problem_stream

RECIPE = Path(__file__).parent / "mini.yaml"
LONG = "A train leaves the station at noon and travels north at forty miles an hour for {} hours; how far?"


def rows(path: Path, questions: list[str]) -> str:
    lines = [
        json.dumps({"question": question, "answer": f"#### {n}"}) for n, question in enumerate(questions)
    ]
    path.write_text("\n".join(lines) + "\n")
    return f"{{source: dataset, name: openai/gsm8k, path: {path}}}"


def words(folder: Path, *more: str) -> list[str]:
    trained = rows(
        folder / "train.jsonl", [LONG.format("three"), "What is two plus two?", "What is six times six?"]
    )
    evaluated = rows(folder / "test.jsonl", [LONG.format("five"), "what is two plus  TWO"])
    return [
        f"stages.rl.data={trained}",
        f"evaluation.data={evaluated}",
        "evaluation.problems=2",
        f"out={folder / 'runs'}",
        *more,
    ]


def words_of(problem: Problem) -> int:
    return len(problem.prompt.split())


def test_overlapping_problems_are_left_out_and_reported(tmp_path: Path) -> None:
    recipe = read_recipe(RECIPE, words(tmp_path, "decontamination={}"))
    check_sources(recipe)
    stage = recipe.stages[1]
    stream = problem_stream(recipe, stage, 1, words_of)
    assert {problem.prompt for problem in stream.next_batch(5)} == {"What is six times six?"}
    report = contamination_report(recipe)
    assert "## rl" in report and "train leaves the station" in report


def test_without_it_all_problems_are_trained(tmp_path: Path) -> None:
    recipe = read_recipe(RECIPE, words(tmp_path))
    stream = problem_stream(recipe, recipe.stages[1], 1, words_of)
    assert len({problem.prompt for problem in stream.next_batch(9)}) == 3
    assert contamination_report(recipe) == ""


def test_a_stage_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    same = rows(tmp_path / "same.jsonl", ["What is two plus two?"])
    overrides = words(tmp_path, "decontamination={}")
    recipe = read_recipe(
        RECIPE, [*overrides, f"stages.rl.data={same}", f"evaluation.data={same}", "evaluation.problems=1"]
    )
    with pytest.raises(UserError, match=r"stage rl: nothing of .* is left to train on"):
        check_sources(recipe)
