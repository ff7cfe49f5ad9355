"""The lines before a run's first step."""

from __future__ import annotations

from pathlib import Path

from megatron_parallel_r1.config.reader import read_recipe
from megatron_parallel_r1.curriculum.banner import banner
from megatron_parallel_r1.run.context import RunContext

RECIPE = Path(__file__).parents[2] / "curriculum/mini.yaml"


def test_it_says_what_a_run_is_and_where_it_resumes(tmp_path: Path) -> None:
    recipe = read_recipe(RECIPE, [f"out={tmp_path}", "parallel.tensor=2"])
    folder = tmp_path / "mini"
    fresh = RunContext.set_up(recipe, folder, resume=False)
    lines = banner(fresh, {"cold_start", "rl"}, world=4).splitlines()
    assert lines[0].split() == ["run", str(folder)]
    assert lines[1].startswith("model    qwen3, ") and lines[1].endswith("float32, from random weights")
    assert lines[2].startswith("layout   4 processes on ") and lines[2].endswith("tensor 2 x data 2")
    assert lines[3:] == [
        "rollout  native, mode isolated, format parallel_r1",
        "stages   cold_start: sft, 30 steps of 8 on embedded_cold_start data",
        "         rl: rl, 8 steps of 12 on embedded data",
    ]


def test_rows_of_a_data_set_are_counted(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"q": "1 + 1", "a": "2"}\n{"q": "1 + 2", "a": ""}\n')
    data = (
        f"{{source: dataset, name: custom, path: {rows}, bad_rows: skip, columns: {{prompt: q, answer: a}}}}"
    )
    recipe = read_recipe(RECIPE, [f"stages.rl.data={data}", f"out={tmp_path}"])
    text = banner(RunContext.set_up(recipe, tmp_path / "mini", resume=False), {"rl"}, world=1)
    assert text.splitlines()[-1] == f"stages   rl: rl, 8 steps of 12 on 1 of 2 rows of {rows}"
