"""What can be known before the first step is said before it, and nothing is written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megatron_parallel_r1.architecture.model_config import ExpertsConfig, ModelConfig
from megatron_parallel_r1.checkpoint_formats.hf_folder import save_hf_folder
from megatron_parallel_r1.config.reader import read_recipe
from megatron_parallel_r1.curriculum.run import run
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.model.weights import random_hf_tensors
from megatron_parallel_r1.rollout.launcher import run as launcher
from megatron_parallel_r1.run import transport
from tests.curriculum.test_bad_input import RECIPE, fail
from tests.serve.release import tokenizer
from tests.unit.rollout.scripted_server import scripted_server
from tests.unit.rollout.test_sglang import FakeSGLang

OWN = ("rollout.engine=sglang", "rollout.servers=1")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (OWN, "no environment with sglang"),
        (
            ("rollout.engine=vllm", "rollout.servers=1", "rollout.sync={transport: disk, folder: OUT/sync}"),
            "stage cold_start: thinking.mode isolated: vllm servers are exact in causal, replay, sequential",
        ),
        (("rollout.sync={transport: disk, folder: /dev/null/sync}", *OWN), "/dev/null is not a folder"),
        (
            ("model.shape.max_positions=60",),
            "a prompt of 7 tokens and a response of 80 need more",
        ),
        (("model.shape.max_positions=20",), "stage cold_start: its longest example has"),
        (
            ("stages.rl.reward={components: [{term: accuracy, weight: heavy}]}",),
            "stages.rl.reward.components.0.weight",
        ),
    ],
)
def test_stages_yet_to_come(capsys, monkeypatch, tmp_path: Path, words: tuple[str, ...], named: str) -> None:
    monkeypatch.setattr(launcher, "__file__", str(tmp_path / "a/b/c/run.py"))  # no checkout with engines
    words = tuple(word.replace("OUT", str(tmp_path / "out")) for word in words)
    shown = fail(capsys, monkeypatch, "curriculum", RECIPE, f"out={tmp_path}/out", *words)
    assert named in shown, shown
    assert not list(tmp_path.iterdir())


def test_servers_without_gpus_of_their_own(capsys, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    shown = fail(capsys, monkeypatch, "curriculum", RECIPE, f"out={tmp_path}/out", *OWN)
    assert "1 servers of tensor 1 need 1 GPUs beside the 1 of the ranks" in shown, shown
    assert not list(tmp_path.iterdir())


def test_data_of_a_later_stage(capsys, monkeypatch, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "What is 1 plus 1?", "answer": "#### 2"}\n')
    words = (f"stages.rl.data={{source: dataset, name: openai/gsm8k, path: {rows}}}", "max_prompt_tokens=1")
    shown = fail(capsys, monkeypatch, "curriculum", RECIPE, f"out={tmp_path}/out", *words)
    assert "stage rl: nothing of its data has at most 1 tokens" in shown and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("info", "named"),
    [
        ({"context_length": 80}, "tokens, prompt and response together, and a response may have 80"),
        ({"model_path": "MODEL"}, "whose head_dim is 16, and the run's model has 8"),
    ],
)
def test_servers_that_cannot_serve(capsys, monkeypatch, tmp_path: Path, info: dict, named: str) -> None:
    from tests.unit.rollout.tiny import tiny_qwen3

    tiny_qwen3(0).save_pretrained(tmp_path / "served")
    capsys.readouterr()
    server = FakeSGLang()
    server.server_info |= {key: str(tmp_path / "served") if v == "MODEL" else v for key, v in info.items()}
    words = [f"out={tmp_path}/out", "thinking.mode=replay", "rollout.engine=sglang"]
    with scripted_server(server) as url:
        assert named in fail(capsys, monkeypatch, "curriculum", RECIPE, *words, f"rollout.urls=[{url}]")
    assert not (tmp_path / "out").exists()


def test_servers_that_return_no_experts(capsys, monkeypatch, tmp_path: Path) -> None:
    shape = ModelConfig(
        *(32, 2, 4, 2, 8, 64, 128), family="qwen3_moe", experts=ExpertsConfig(4, 2, 16), tied=False
    )
    save_hf_folder(tmp_path / "model", shape, random_hf_tensors(shape, 0), tokenizer())
    server = FakeSGLang()
    server.server_info["context_length"] = server.server_info["max_req_input_len"] = 90
    words = [f"out={tmp_path}/out", f"model={{path: {tmp_path}/model}}", "thinking.mode=replay"]
    with scripted_server(server) as url:
        words += ["rollout.engine=sglang", f"rollout.urls=[{url}]"]
        shown = fail(capsys, monkeypatch, "curriculum", RECIPE, *words)
        assert f"stage rl: objective.replay_experts: {url} return no experts" in shown
    assert not (tmp_path / "out").exists()


def test_another_nccl(capsys, monkeypatch, tmp_path: Path) -> None:
    server = FakeSGLang()
    server.server_info["context_length"] = server.server_info["max_req_input_len"] = 90
    server.server_info["internal_states"] = [{"parallel_r1": {"nccl": [2, 30, 7]}}]
    monkeypatch.setattr(transport, "trainer_nccl", lambda: (2, 27, 3))
    words = [f"out={tmp_path}/out", "thinking.mode=replay", "rollout.engine=sglang"]
    with scripted_server(server) as url:
        shown = fail(capsys, monkeypatch, "curriculum", RECIPE, *words, f"rollout.urls=[{url}]")
    assert f"NCCL is 2.27.3 here and 2.30.7 in {url}" in shown and not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_somebody_else(capsys, monkeypatch, tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    assert "cannot be written by this user" in fail(
        capsys, monkeypatch, "curriculum", RECIPE, f"out={tmp_path}/out"
    )


def test_a_report_that_cannot_be_written(capsys, monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "run/rl").mkdir(parents=True)
    record = {"kind": "rl", "step": 1, "steps": 1, "reward": 0.5}
    (tmp_path / "run/rl/metrics.jsonl").write_text(json.dumps(record) + "\n")
    words = ("report", str(tmp_path / "run"), "--out")
    assert "name another file with --out" in fail(capsys, monkeypatch, *words, str(tmp_path / "no/x.html"))
    from megatron_parallel_r1.report.html import build_report

    assert build_report(tmp_path / "run", out=tmp_path / "x.html").is_file()
    assert not (tmp_path / "run/report.html").exists()


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path: Path) -> None:
    reward = "stages.rl.reward={name: s2, settings: {window: 2, share: 5e-1}}"
    (_, stage) = read_recipe(Path(RECIPE), [reward]).stages
    assert stage.reward.settings["share"] == 0.5
    parts = "stages.rl.reward={components: [{term: accuracy, weight: 1e-1}]}"
    (_, stage) = read_recipe(Path(RECIPE), [parts]).stages
    assert stage.reward.components[0].weight.value == 0.1


COLUMNS = "columns: {prompt: q, response: r, answer: a}"


def write_row(file: Path, response: str) -> Path:
    file.write_text(json.dumps({"q": f"What is 1 plus {file.stem}?", "r": response, "a": "1"}) + "\n")
    return file


def test_fresh_counts_nothing_as_done(capsys, monkeypatch, tmp_path: Path) -> None:
    folder = tmp_path / "mini"
    (folder / "cold_start/model").mkdir(parents=True)
    for name in ("config.yaml", "stages.json"):
        (folder / name).touch()
    before = sorted(folder.rglob("*"))
    words = (RECIPE, "--fresh", f"out={tmp_path}")
    broken = write_row(tmp_path / "2.jsonl", "1 </Path> 1")
    data = f"stages.cold_start.data={{source: dataset, name: custom, path: {broken}, {COLUMNS}}}"
    assert "</Path>" in fail(capsys, monkeypatch, "curriculum", *words, data)
    with pytest.raises(UserError, match="stage rl starts from cold_start, which is not done"):
        run(read_recipe(Path(RECIPE), [f"out={tmp_path}"]), only={"rl"}, fresh=True)
    assert sorted(folder.rglob("*")) == before


def test_every_set_of_a_mixture_is_seen_whole(capsys, monkeypatch, tmp_path: Path) -> None:
    short, long = write_row(tmp_path / "2.jsonl", "1"), write_row(tmp_path / "3.jsonl", "1 " * 200)
    sets = ", ".join(
        f"{{name: custom, label: a{weight}, path: {file}, {COLUMNS}, weight: {weight}}}"
        for file, weight in ((short, 1), (long, 0.001))
    )
    data = f"stages.cold_start.data={{source: mixture, sets: [{sets}]}}"
    words = (data, "stages.cold_start.held_out_examples=0", "model.shape.max_positions=150")
    shown = fail(capsys, monkeypatch, "curriculum", RECIPE, f"out={tmp_path}/out", *words)
    assert "stage cold_start: its longest example has 20" in shown, shown
