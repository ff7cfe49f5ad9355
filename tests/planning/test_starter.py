"""`parallel-r1 init`: what it writes is planned, its columns are read, and on a CPU it trains."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from megatron_parallel_r1.cli import app
from megatron_parallel_r1.config.reader import read_recipe
from megatron_parallel_r1.data.columns import read_columns
from megatron_parallel_r1.data.readers import read_examples
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.planning.plan import GIB
from megatron_parallel_r1.planning.starter import InitOptions, starter
from megatron_parallel_r1.rewards.verification import extract_answer
from tests.engines.twins import write_model, write_rows

ROOT = Path(__file__).resolve().parents[2]
ROW = {"question": "What is 2 + 3?", "answer": "So it is #### 5"}


def write_jsonl(file: Path, *rows: dict[str, object]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def written(data: Path | str, *, columns: dict[str, str] | None = None) -> dict:
    """The recipe for Qwen3-4B on one node."""
    options = InitOptions("Qwen/Qwen3-4B-Base", str(data), None, None, columns or {}, gpus=8)
    return yaml.safe_load(starter(options, "run").text)


@pytest.mark.parametrize(
    ("model", "gpus", "split"),
    [
        ("Qwen3-4B-Base", 8, (1, 1)),
        ("Qwen3-14B", 8, (4, 1)),
        ("Qwen3-30B-A3B", 16, (4, 1)),
        ("Qwen3-32B", 32, (4, 1)),
    ],
)
def test_a_published_model_gets_the_smallest_split_that_fits(
    model: str, gpus: int, split: tuple[int, int], tmp_path: Path
) -> None:
    out = tmp_path / "recipe.yaml"
    words = ["--model", f"Qwen/{model}", "--data", "openai/gsm8k", "--evaluation", "HuggingFaceH4/MATH-500"]
    done = CliRunner().invoke(app, ["init", *words, "--gpus", str(gpus), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert f"parallel-r1 download Qwen/{model}" in done.output and f"--nodes {gpus // 8}" in done.output
    recipe = read_recipe(out)
    assert (recipe.parallel.tensor, recipe.parallel.pipeline) == split
    assert recipe.evaluation is not None and all(stage.evaluate for stage in recipe.stages)
    again = CliRunner().invoke(app, ["init", *words, "--out", str(out)])
    assert isinstance(again.exception, UserError) and "exists" in str(again.exception)


def test_a_model_too_large_is_refused() -> None:
    with pytest.raises(UserError, match=r"4\.0B weights fit no layout of 2 GPUs with 16 GiB"):
        starter(InitOptions("Qwen/Qwen3-4B", "openai/gsm8k", None, None, {}, gpus=2, gpu=16 * GIB), "run")


@pytest.mark.parametrize(
    ("row", "found"),
    [
        (ROW, {"prompt": "question", "answer": "answer"}),
        (
            {"prompt": [{"role": "user", "content": "2 + 3?"}], "reward_model": {"ground_truth": "5"}},
            {"prompt": "prompt", "answer": "reward_model.ground_truth"},
        ),
        ({"problem": "2 + 3?", "solution": r"It is \boxed{5}."}, {"prompt": "problem", "answer": "solution"}),
    ],
)
def test_columns_are_found_by_their_usual_names(
    row: dict[str, object], found: dict[str, str], tmp_path: Path
) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", row)
    assert written(file)["stages"][1]["data"] == {
        "source": "dataset",
        "name": "custom",
        "path": str(file),
        "columns": found,
    }


def test_columns_of_other_names_are_asked_for(tmp_path: Path) -> None:
    file = write_jsonl(
        tmp_path / "rows.jsonl", {"aufgabe": "2 + 3?", "ergebnis": "5"}, {"aufgabe": "?", "ergebnis": ""}
    )
    with pytest.raises(UserError, match=r"no column looks like the prompt \(aufgabe, ergebnis\)"):
        written(file)
    data = written(file, columns=read_columns("prompt=aufgabe,answer=ergebnis"))["stages"][1]["data"]
    assert data["columns"] == {"prompt": "aufgabe", "answer": "ergebnis"}
    assert data["bad_rows"] == "skip"  # for the second row, which has no answer
    for words in ("prompt=a", "prompt=a,answer=", "a"):
        with pytest.raises(UserError, match="give prompt=NAME,answer=NAME"):
            read_columns(words)
    with pytest.raises(UserError, match="unknown"):
        written("no_such_file.jsonl")


def test_data_of_ones_own(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "examples/own_data.py", str(tmp_path)], check=True, cwd=ROOT, timeout=600)
    columns = read_columns("prompt=task,answer=result")
    traces = f"Parallel-R1/Parallel-GSM8K={tmp_path / 'traces.jsonl'}"
    problems = str(tmp_path / "problems.jsonl")
    options = InitOptions("Qwen/Qwen3-4B-Base", problems, traces, None, columns, gpus=8)
    stages = yaml.safe_load(starter(options, "run").text)["stages"]
    assert not any("bad_rows" in stage["data"] for stage in stages)  # every row can be read
    examples = read_examples("Parallel-R1/Parallel-GSM8K", tmp_path / "traces.jsonl").items
    assert len(examples) == 100
    assert all(extract_answer(example.response) == example.problem.answers[0] for example in examples)


@pytest.mark.slow
def test_a_recipe_for_a_cpu_trains(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    problems = write_rows(tmp_path, "openai/gsm8k")
    examples = write_rows(tmp_path, "Parallel-R1/Parallel-GSM8K")
    out = tmp_path / "first.yaml"
    words = ["--model", str(model), "--data", str(problems), "--gpus", "0", "--out", str(out)]
    cold_start = ["--cold-start", f"Parallel-R1/Parallel-GSM8K={examples}"]
    done = CliRunner().invoke(app, ["init", *words, *cold_start])
    assert done.exit_code == 0, done.output
    assert done.output.endswith(f"parallel-r1 curriculum {out}\n")
    command = [sys.executable, "-m", "megatron_parallel_r1.cli", "curriculum", str(out), f"out={tmp_path}"]
    few = ["stages.cold_start.steps=1", "stages.rl.steps=1", "thinking.max_response_tokens=64"]
    short = ["stages.rl.prompts_per_step=2", "stages.rl.samples_per_prompt=2", "thinking.max_path_tokens=16"]
    subprocess.run([*command, *few, *short], check=True, timeout=600, stdout=subprocess.DEVNULL)
    assert (tmp_path / "first/release/model.safetensors").is_file()
