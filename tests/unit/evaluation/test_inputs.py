"""What evaluation reads: benchmarks, checkpoints, engines by name; and what it says where it cannot."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.evaluation.benchmarks import read_benchmarks
from megatron_parallel_r1.evaluation.checkpoints import fingerprint, open_checkpoint, stages_of
from megatron_parallel_r1.evaluation.engines import EngineSpec, engine_opener
from megatron_parallel_r1.evaluation.evaluator import EvaluationPlan
from megatron_parallel_r1.evaluation.modes import EvaluationMode
from megatron_parallel_r1.rollout.settings import Thinking

RECIPE = Path(__file__).parents[2] / "curriculum" / "mini.yaml"


def test_embedded_benchmarks_need_no_data() -> None:
    hard, easy = read_benchmarks(["embedded_hard", "embedded_easy"], limit=5)
    assert [len(hard.problems), len(easy.problems)] == [5, 5]
    assert "x²" in hard.problems[0].prompt and "x²" not in easy.problems[0].prompt
    assert read_benchmarks(["embedded_hard"], limit=5)[0] == hard


def test_a_folder_of_copies(tmp_path: Path) -> None:
    rows = [{"problem": f"{i} + 1", "answer": str(i + 1), "solution": "", "url": ""} for i in range(4)]
    for name in ("aime24.jsonl", "MATH-500.jsonl", "own.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    aime, math = read_benchmarks(["aime24", "math500"], tmp_path, limit=3)
    assert [p.answers for p in aime.problems] == [("1",), ("2",), ("3",)]
    assert aime.source == str(tmp_path / "aime24.jsonl") and math.source.endswith("MATH-500.jsonl")
    (own,) = read_benchmarks([f"aime25={tmp_path / 'own.jsonl'}"], tmp_path)
    assert (own.name, len(own.problems)) == ("aime25", 4)
    with gzip.open(tmp_path / "aime25.jsonl.gz", "wt") as file:
        file.write(json.dumps(rows[0]))
    (zipped,) = read_benchmarks(["aime25"], tmp_path)
    assert zipped.source == str(tmp_path / "aime25.jsonl.gz") and len(zipped.problems) == 1
    with pytest.raises(UserError, match=r"no copy of amc23 \(amc23.parquet, amc23.jsonl"):
        read_benchmarks(["amc23"], tmp_path)


@pytest.mark.parametrize(
    ("names", "limit", "what"),
    [
        ([], None, "no benchmark given"),
        (["aime23"], None, "'aime23': unknown, use one of aime24"),
        (["embedded_hard=x"], None, "unknown"),
        (["=x.jsonl"], None, "unknown"),
        (["mine=/nowhere/x.jsonl"], None, "/nowhere/x.jsonl: no such data file"),
        (["embedded_hard", "embedded_hard"], 2, "given twice"),
        (["embedded_easy"], 0, "--limit 0"),
        (["embedded_easy"], 508, "507 are held out"),
        (["aime24=/nowhere/x.parquet"], None, "/nowhere/x.parquet"),
    ],
)
def test_bad_benchmarks(names: list[str], limit: int | None, what: str) -> None:
    with pytest.raises(UserError, match=what):
        read_benchmarks(names, limit=limit)


def test_rows_of_ones_own(tmp_path: Path) -> None:
    rows = [{"instruction": f"{i} + 1", "target": str(i + 1), "note": ""} for i in range(4)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for name in ("own.jsonl", "split/train.jsonl", "split/test.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(lines if "train" not in name else lines * 2)
    own, split = read_benchmarks([f"own={tmp_path / 'own.jsonl'}", f"split={tmp_path / 'split'}"])
    assert [(problem.prompt, problem.answers) for problem in own.problems] == [
        (f"{i} + 1", (str(i + 1),)) for i in range(4)
    ]
    assert (own.name, own.problems[0].source, len(split.problems)) == ("own", "own", 4)
    (tmp_path / "other.jsonl").write_text('{"aufgabe": "2 + 3", "ergebnis": 5}\n')
    other = f"other={tmp_path / 'other.jsonl'}"
    with pytest.raises(UserError, match=r"no column looks like the prompt \(aufgabe, ergebnis\)"):
        read_benchmarks([other])
    (read,) = read_benchmarks([other], columns={"prompt": "aufgabe", "answer": "ergebnis"})
    assert read.problems[0].answers == ("5",)


@pytest.mark.parametrize(("name", "count"), [("aime24", 30), ("aime25", 30), ("amc23", 40)])
def test_real_copies(name: str, count: int, real_data: Path) -> None:
    (found,) = read_benchmarks([name], real_data)
    assert len(found.problems) == count


def release(folder: Path, **thinking: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    values = {
        **Thinking(mode="replay", paths=3).model_dump(),
        "prompt": "plain",
        "prompt_template": "{problem}!",
    }
    (folder / "thinking.json").write_text(json.dumps({**values, **thinking}))
    return folder


def test_a_release_tells_how_it_decodes(tmp_path: Path) -> None:
    folder = release(tmp_path / "tiny/release", later_addition=[1])
    found = open_checkpoint(folder)
    assert (found.name, found.source, found.step) == ("tiny", folder.resolve() / "thinking.json", None)
    assert found.decoding.thinking == Thinking(mode="replay", paths=3)
    assert found.decoding.template == "{problem}!"
    assert open_checkpoint(tmp_path / "tiny").folder == folder


def test_it_tells_how_far_it_is_trained(tmp_path: Path) -> None:
    folders = [release(tmp_path / f"release_{step}", stage="rl", step=450 + step) for step in (100, 200)]
    found = [open_checkpoint(folder) for folder in folders]
    assert [(checkpoint.name, checkpoint.step) for checkpoint in found] == [
        ("release_100", 550),
        ("release_200", 650),
    ]


def test_a_stage_is_asked_with_the_prompt_that_is_stored_with_it(tmp_path: Path) -> None:
    """Of a run made before stages had their own `thinking.json`, with the one of its recipe."""
    shutil.copy(RECIPE, tmp_path / "config.yaml")
    (tmp_path / "stages.json").write_text('["cold_start", "rl"]')
    for stage, steps in (("cold_start", 20), ("rl", 8)):
        release(tmp_path / stage / "model", stage=stage, prompt_template=f"{stage}: {{problem}}", step=28)
        (tmp_path / stage / "metrics.jsonl").write_text(json.dumps({"kind": "", "step": steps}) + "\n")
    (tmp_path / "cold_start" / "model" / "thinking.json").unlink()
    opened = [open_checkpoint(tmp_path / stage) for stage in ("cold_start", "rl")]
    for first, last in (stages_of(tmp_path), opened):
        assert (first.name, first.step, first.decoding.template) == ("cold_start", 20, "{problem}")
        assert (last.name, last.step, last.decoding.template) == ("rl", 28, "rl: {problem}")


def test_a_folder_that_does_not_gets_the_defaults(tmp_path: Path) -> None:
    folder = release(tmp_path / "qwen")
    (folder / "thinking.json").unlink()
    found = open_checkpoint(folder)
    assert found.source is None and found.decoding.thinking == Thinking()
    assert "<Parallel>" in found.decoding.template


@pytest.mark.parametrize(
    ("thinking", "what"),
    [
        ({"paths": 0}, "paths: Input should be greater than or equal to 1"),
        ({"mode": "loops"}, "mode"),
        ({"prompt_template": "no place"}, r"prompt_template must be a text with \{problem\}"),
        ({"prompt_template": None}, "prompt_template"),
        ({"prompt_template": "{{problem}}"}, r"prompt_template must be a text with \{problem\}"),
        ({"step": "200"}, "step must be a number of training steps"),
    ],
)
def test_bad_thinking(thinking: dict[str, object], what: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=what) as caught:
        open_checkpoint(release(tmp_path / "x", **thinking))
    assert "thinking.json" in str(caught.value)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config.json; give the folder"):
        open_checkpoint(tmp_path)
    (release(tmp_path / "x") / "thinking.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        open_checkpoint(tmp_path / "x")


def test_a_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    one, other = release(tmp_path / "one"), release(tmp_path / "other", paths=8)
    assert fingerprint(one) == fingerprint(other)
    (other / "model.safetensors").write_bytes(b"weighty")
    assert fingerprint(one) != fingerprint(other)
    (other / "model.safetensors").write_bytes(b"weights")
    (other / "tokenizer.json").write_text("{}")
    assert fingerprint(one) != fingerprint(other)


@pytest.mark.parametrize("name", ["slime", "Native", ""])
def test_engines_that_are_not_built_in(name: str) -> None:
    with pytest.raises(UserError, match=f"engine '{name}': not built in, use one of native, sglang, vllm"):
        engine_opener(name)


@pytest.mark.parametrize("name", ["sglang", "vllm"])
def test_server_engines_need_servers_and_one_process(name: str, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(UserError, match=f"engine {name}: give --server URL"):
        engine_opener(name)(EngineSpec(tmp_path)).__enter__()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="start it without torchrun"):
        engine_opener(name)(EngineSpec(tmp_path, servers=("http://127.0.0.1:1",))).__enter__()


@pytest.mark.parametrize(
    ("samples", "mode", "found"),
    [(None, "parallel", 1), (16, "parallel", 16), (None, "majority@8", 8), (16, "majority@8", 16)],
)
def test_samples_of_a_mode(samples: int | None, mode: str, found: int) -> None:
    assert EvaluationPlan(Path("out"), samples=samples).samples_in(EvaluationMode.of(mode)) == found


@pytest.mark.parametrize(
    ("samples", "mode"), [(0, "parallel"), (-1, "sequential"), (12, "majority@8"), (4, "majority@8")]
)
def test_samples_that_make_no_vote(samples: int, mode: str) -> None:
    with pytest.raises(UserError, match=f"--samples {samples}: mode {mode} needs"):
        EvaluationPlan(Path("out"), samples=samples).samples_in(EvaluationMode.of(mode))
