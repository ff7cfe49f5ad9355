"""What a run knows of its data: digests that tell what changed, and the problems held out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_parallel_r1.config.reader import read_recipe
from megatron_parallel_r1.run.datasets import EVALUATION, contamination_report, data_digests

RECIPE = Path(__file__).parents[2] / "curriculum/mini.yaml"
LEVEL = "prompt_template='{level}: {problem}'"
OWN = "stages.rl.reward={components: [{term: accuracy}, {term: 'examples.own_reward:brief'}]}"
TRAIN = "A train leaves the station at noon and travels north at forty miles an hour for {} hours; how far?"


def row(question: str, **columns: Any) -> dict[str, Any]:
    return {"q": question, "a": "1", **columns}


@pytest.fixture
def words(tmp_path: Path) -> Callable[..., list[str]]:
    def write(
        name: str, rows: list[dict[str, Any]], held_out: list[dict[str, Any]] | None = None
    ) -> list[str]:
        sources = []
        for role, lines in (("train", rows), ("test", held_out or [row("What is 1 plus 9?", level="hard")])):
            file = tmp_path / f"{name}.{role}.jsonl"
            file.write_text("".join(json.dumps(line) + "\n" for line in lines))
            sources.append(
                f"{{source: dataset, name: custom, path: {file}, bad_rows: skip, "
                "columns: {prompt: q, answer: a}}"
            )
        cold_start = "stages.cold_start.data={source: embedded_cold_start}"
        data = (f"stages.rl.data={sources[0]}", f"evaluation.data={sources[1]}", "evaluation.problems=1")
        return [cold_start, *data, f"out={tmp_path}"]

    return write


@pytest.mark.parametrize(
    ("changed", "settings", "is_noticed"),
    [
        ({"level": "easy"}, (), False),
        ({"level": "easy"}, (LEVEL,), True),
        ({"level": "easy"}, (OWN,), True),
        ({"notes": {"b": 1, "a": [2]}}, (OWN,), True),
    ],
)
def test_a_column_counts_where_something_reads_it(
    words: Callable[..., list[str]], changed: dict[str, Any], settings: tuple[str, ...], is_noticed: bool
) -> None:
    problem = row("What is 1 plus 2?", level="hard", notes={})
    then, now, again = (
        data_digests(read_recipe(RECIPE, [*words(name, [rows]), *settings]))
        for name, rows in (("then", problem), ("now", problem | changed), ("again", problem))
    )
    assert then == again and then.keys() == {"rl", EVALUATION}
    assert (then["rl"] != now["rl"]) == is_noticed


def test_decontamination_reads_the_evaluation_as_the_run_does(words: Callable[..., list[str]]) -> None:
    held_out = [row("What is 1 plus 9?"), row(TRAIN.format("five"), level="hard")]  # the first lacks a level
    data = words("overlap", [row(TRAIN.format("three"), level="hard")], held_out)
    recipe = read_recipe(RECIPE, [*data, LEVEL, "decontamination={}"])
    assert "train leaves the station" in contamination_report(recipe)
