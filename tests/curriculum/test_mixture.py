"""Mixtures of data sets: shares, order, resumption, metrics by source, and what a run says about its data."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_parallel_r1.config.reader import read_recipe
from megatron_parallel_r1.config.recipe import Recipe
from megatron_parallel_r1.config.stages import SftStage
from megatron_parallel_r1.data.problems import Example, Problem
from megatron_parallel_r1.data.row_cache import RowCache
from megatron_parallel_r1.data.sampler import ProblemStream
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.run.datasets import (
    check_sources,
    data_report,
    evaluation_problems,
    example_rows,
    held_out_examples,
    load_tokenizer,
    problem_stream,
)
from megatron_parallel_r1.sft.loop import example_row
from megatron_parallel_r1.thought.layout import Row, lay_out
from megatron_parallel_r1.thought.tokenizer import add_tags
from megatron_parallel_r1.thought.tree import Tree
from tests.curriculum.test_run import RECIPE, run

COLUMNS = {"prompt": "q", "answer": "a", "response": "r"}


def sets(folder: Path, **weights: float) -> dict[str, Any]:
    """A mixture of data sets of five rows each, under the names of their files."""
    entries = []
    for name, weight in weights.items():
        path = folder / f"{name}.jsonl"
        rows = [{"q": f"{name} {i}", "a": i, "r": f"{i}", "level": i % 2} for i in range(5)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        entry = {"name": "custom", "path": str(path), "columns": COLUMNS, "label": name, "weight": weight}
        entries.append(entry)
    return {"source": "mixture", "sets": entries}


def recipe_of(data: dict[str, Any], *more: str) -> Recipe:
    return read_recipe(RECIPE, [f"stages.rl.data={json.dumps(data)}", *more])


def drawn(recipe: Recipe, start: int, count: int) -> list[Problem]:
    stream = problem_stream(recipe, recipe.stages[1], 7, lambda problem: 1)
    stream.restore({"position": start})
    return list(stream.next_batch(count))


def test_problems_come_in_proportion_in_one_order_that_resumes_anywhere(tmp_path: Path) -> None:
    recipe = recipe_of(sets(tmp_path, a=3, b=1, c=0.5))
    whole = drawn(recipe, 0, 90)
    counts = Counter(problem.source for problem in whole)
    assert abs(counts["a"] - 60) <= 2 and abs(counts["b"] - 20) <= 2 and abs(counts["c"] - 10) <= 2
    for start in (1, 44, 89):
        assert drawn(recipe, start, 90 - start) == whole[start:]
    of_b = [problem.prompt for problem in whole if problem.source == "b"]
    assert len(set(of_b[:5])) == 5, "each set goes through its own epochs"
    assert drawn(recipe_of(sets(tmp_path, a=3, b=1, c=0.5), "stages.rl.data.sets.0.buffer=2"), 0, 5)


def test_examples_are_mixed_too(tmp_path: Path) -> None:
    data = sets(tmp_path, a=1, b=1)
    recipe = read_recipe(RECIPE, [f"stages.cold_start.data={json.dumps(data)}"])
    tokenizer = load_tokenizer(recipe)
    tags = add_tags(tokenizer)
    to_row = partial(example_row, tokenizer=tokenizer, tags=tags, template="plain", mode="isolated")
    cache = RowCache(tmp_path / "rows", "made here", "plain", "isolated")

    def stream() -> ProblemStream:
        return example_rows(recipe, recipe.stages[0], 1, to_row, cache)

    whole = [row.tokens_L.tolist() for row in stream().next_batch(20)]
    later = stream()
    later.restore({"position": 13})
    assert [row.tokens_L.tolist() for row in later.next_batch(7)] == whole[13:]


def test_held_out_examples_are_of_each_set_and_never_trained_on(tmp_path: Path) -> None:
    data = sets(tmp_path, a=2, b=1)
    recipe = read_recipe(
        RECIPE, [f"stages.cold_start.data={json.dumps(data)}", "stages.cold_start.held_out_examples=3"]
    )
    stage = recipe.stages[0]
    assert isinstance(stage, SftStage)
    held_out = held_out_examples(recipe, stage, 1)
    assert sorted(example.problem.source for example in held_out) == ["a", "a", "b"]
    assert held_out == held_out_examples(recipe, stage, 1)
    trained: set[str] = set()

    def to_row(example: Example) -> Row:
        trained.add(f"{example.problem.source}:{example.problem.id}")
        return lay_out([0], [1], [True], Tree(1, ()), "isolated")

    cache = RowCache(tmp_path / "rows", "made here", "plain", "isolated")
    example_rows(recipe, stage, 1, to_row, cache).next_batch(60)
    kept_out = {f"{example.problem.source}:{example.problem.id}" for example in held_out}
    assert trained.isdisjoint(kept_out) and len(trained) + len(kept_out) == 10
    with pytest.raises(UserError, match=r"held_out_examples takes 20 of the 5 examples of .*; lower it"):
        example_rows(recipe, stage.model_copy(update={"held_out_examples": 30}), 1, to_row, cache).next_batch(
            1
        )


def test_an_evaluation_takes_of_each_set_while_it_lasts(tmp_path: Path) -> None:
    data = sets(tmp_path, a=2, b=1)
    evaluation = json.dumps({"data": data, "problems": 6})
    recipe = read_recipe(RECIPE, [f"evaluation={evaluation}"])
    assert recipe.evaluation is not None
    ids = [problem.id for problem in evaluation_problems(recipe.evaluation.data, 6)]
    assert ids == ["a:0", "a:1", "b:0", "a:2", "a:3", "b:1"]
    assert len(evaluation_problems(recipe.evaluation.data, 99)) == 10


def test_two_sets_of_one_name_are_refused(tmp_path: Path) -> None:
    data = sets(tmp_path, a=1, b=1)
    del data["sets"][0]["label"], data["sets"][1]["label"]
    with pytest.raises(UserError, match="two sets of the mixture are called custom; give each a label"):
        recipe_of(data)


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{level} {problem}", "shows level, but embedded problems have no columns"),
        ("Solve it.", "is no template"),
    ],
)
def test_a_template_that_the_data_cannot_fill_is_refused(template: str, what: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=what):
        check_sources(read_recipe(RECIPE, [f"prompt_template={json.dumps(template)}"]))


def test_what_is_wrong_with_the_data_is_said_once_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = sets(tmp_path, a=1)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"q": "a 0", "a": 0, "r": "0"}\n{"q": "a 1", "a": 7, "r": "7"}\n')
    recipe = recipe_of(data)
    check_sources(recipe)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[2].partition(",")[0] for line in lines] == [
        "1 of 7 rows repeat an earlier problem",
        "2 of 7 rows contradict another row about the right answer of a problem",
    ]
    report = data_report(recipe)
    assert report.startswith("## rl\n") and "| 7 | 7 | 0 |" in report
    assert all(f"- {line}\n" in report for line in lines)


@pytest.mark.slow
def test_a_run_on_a_mixture_tells_its_sources_apart(tmp_path: Path) -> None:
    held_out = tmp_path / "held_out"
    held_out.mkdir()
    evaluation = {"data": sets(held_out, d=1, e=1), "problems": 4}
    shown = run(
        tmp_path / "out",
        "curriculum",
        str(RECIPE),
        f"stages.cold_start.data={json.dumps(sets(tmp_path, a=1, b=1))}",
        f"stages.rl.data={json.dumps(sets(tmp_path, a=1, b=2))}",
        f"evaluation={json.dumps(evaluation)}",
        f"prompt_template={json.dumps('{level} {problem}')}",
        "stages.cold_start.steps=2",
        "stages.rl.steps=1",
        "thinking.max_response_tokens=24",
    )
    folder = tmp_path / "out/mini"
    (step,) = [json.loads(line) for line in (folder / "rl/metrics.jsonl").read_text().splitlines()]
    assert {"accuracy/a", "accuracy/b", "reward/a", "reward/b"} <= step.keys()
    evaluated = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
    assert all(record["problems/d"] == record["problems/e"] == 2 for record in evaluated)
    assert all(record["ci95_low/d"] <= record["accuracy/d"] <= record["ci95_high/d"] for record in evaluated)
    assert ", d 0.0%, e 0.0%" in shown.stdout
    assert "## rl" in (folder / "data.md").read_text() and "data.md" in (folder / "report.html").read_text()
    thinking = json.loads((folder / "release/thinking.json").read_text())
    assert thinking["prompt_template"] == "{level} {problem}"
