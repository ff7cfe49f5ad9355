"""A whole run on a model of nothing: what it leaves behind, and that killing it changes nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

RECIPE = Path(__file__).parent / "mini.yaml"


def command(out: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "megatron_parallel_r1.cli", *words, f"out={out}"]


def run(out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(out, *words), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def steps_of(stage: Path) -> list[int]:
    file = stage / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole")
    shown = run(out, "curriculum", str(RECIPE)).stdout
    assert "cold_start  step 30/30" in shown and "rl  step 8/8" in shown
    assert str(out / "mini/release") in shown and str(out / "mini/report.html") in shown
    return out / "mini"


def test_it_leaves_metrics_models_evaluations_and_a_report(whole: Path) -> None:
    assert steps_of(whole / "cold_start") == list(range(1, 31))
    assert steps_of(whole / "rl") == list(range(1, 9))
    records = [json.loads(line) for line in (whole / "rl/metrics.jsonl").read_text().splitlines()]
    assert [record["reward_term"] for record in records] == ["accuracy", "accuracy+parallel_bonus"] * 4
    assert max(record["mismatch_max"] for record in records) <= 2e-5
    evaluated = [json.loads(line) for line in (whole / "eval.jsonl").read_text().splitlines()]
    assert [(e["stage"], e["problems"], e["mode"]) for e in evaluated] == [
        ("cold_start", 24, "isolated"),
        ("rl", 24, "isolated"),
    ]
    assert "rl" in (whole / "report.html").read_text()
    assert list(whole.glob("rl/tensorboard/events*"))
    assert len((whole / "rl/traces.jsonl").read_text().splitlines()) == 8 * 2
    assert len((whole / "rl/eval_traces.jsonl").read_text().splitlines()) == 6
    assert not list(whole.glob("*/checkpoints"))


def documented(heading: str) -> set[str]:
    """Fields of a row of the table of metrics in docs/architecture.md."""
    table = (Path(__file__).parents[2] / "docs/architecture.md").read_text()
    (row,) = [line for line in table.splitlines() if line.startswith(f"| {heading} |")]
    return set(re.findall(r"`([a-z0-9_<>]+)`", row.removeprefix(f"| {heading} |")))


def test_every_metric_is_documented_and_every_documented_one_is_logged(whole: Path) -> None:
    """What only some objectives report: tests/unit/rl/test_learner.py; servers: docs/rollout.md."""
    always = {"stage", "kind", "step", "steps"}
    (first_eval, *_), (first_sft, *_) = (
        [json.loads(line) for line in (whole / name).read_text().splitlines()]
        for name in ("eval.jsonl", "cold_start/metrics.jsonl")
    )
    assert set(first_sft) == always | documented("`sft`")
    *_, last_sft = (whole / "cold_start/metrics.jsonl").read_text().splitlines()
    assert set(json.loads(last_sft)) == set(first_sft) | documented("`sft`, every few steps")
    assert set(first_eval) - {"stage", "kind", "step"} == documented("`eval`")
    rows = ("`rl`, traces", "`rl`, learning", "`rl`, timers")
    expected = always.union(*map(documented, rows)) - {"reward_<component>"}
    for line in (whole / "rl/metrics.jsonl").read_text().splitlines():
        assert set(json.loads(line)) == expected | {"reward_accuracy", "reward_parallel_bonus"}
    assert documented("`rl`, depending on the objective") - {"reward"} == (
        {"kl", "penalty_kl", "penalty_overlong", "clip_dual"}
        | {"correction", "corrected", "correction_effective", "time_verify_paths_s"}
    )


def test_the_release_is_a_hugging_face_model(whole: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_parallel_r1.checkpoint_formats.hf_folder import load_hf_folder
    from megatron_parallel_r1.distributed import process
    from megatron_parallel_r1.model.gpt import build_model, logits
    from megatron_parallel_r1.model.weights import load_hf_tensors

    tokenizer = AutoTokenizer.from_pretrained(whole / "release")
    text = "Solve mod 13: 3x² +5x +4 =7 <Parallel><Path> x=5 no none</Path>"
    tokens = tokenizer.encode(text)
    assert "".join(tokenizer.decode(tokens).split()) == "".join(text.split())
    tokens_1L = torch.tensor([tokens])
    with torch.no_grad(), process.running(0):
        theirs = AutoModelForCausalLM.from_pretrained(whole / "release").eval()(tokens_1L).logits
        shape, tensors = load_hf_folder(whole / "release")
        model = build_model(shape)
        load_hf_tensors(model, tensors)
        index_L = torch.arange(len(tokens), dtype=torch.int32)
        layout_KL = torch.stack([index_L, torch.zeros_like(index_L)])
        ours = logits(model, tokens_1L, index_L[None].long(), layout_KL)
    assert (ours - theirs).abs().max() <= 2e-5
    thinking = json.loads((whole / "release/thinking.json").read_text())
    assert (thinking["mode"], thinking["paths"], thinking["prompt"]) == ("isolated", 3, "plain")
    assert json.loads((whole / "rl/model/thinking.json").read_text()) == thinking
    assert [
        (stored["stage"], stored["step"], stored["prompt_template"])
        for stage in ("cold_start", "rl")
        for stored in [json.loads((whole / stage / "model/thinking.json").read_text())]
    ] == [("cold_start", 30, "{problem}"), ("rl", 38, "{problem}")]
    assert "| rl | rl | embedded (easy) | 8 |" in (whole / "release/README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "step"), [("cold_start", 14), ("rl", 5)])
def test_killed_and_started_again_it_ends_the_same(
    whole: Path, tmp_path: Path, stage: str, step: int
) -> None:
    process = subprocess.Popen(
        command(tmp_path, "curriculum", str(RECIPE)), stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 200
    while max(steps_of(tmp_path / "mini" / stage), default=0) < step:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "mini" / stage / "model").exists()

    run(tmp_path, "curriculum", str(RECIPE))
    folder = tmp_path / "mini"
    for name in ("cold_start/model", "rl/model", "release"):
        ours, theirs = (load_file(f / name / "model.safetensors") for f in (folder, whole))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert steps_of(folder / stage) == steps_of(whole / stage)
    rewards = [
        [json.loads(line).get("reward") for line in (f / "rl/metrics.jsonl").read_text().splitlines()]
        for f in (folder, whole)
    ]
    assert rewards[0] == rewards[1]


def test_eval_and_report_on_a_finished_run(whole: Path) -> None:
    shown = run(whole.parent, "eval", str(RECIPE)).stdout
    assert "release" in shown and "isolated" in shown
    last = json.loads((whole / "eval.jsonl").read_text().splitlines()[-1])
    for figure in (f"{100 * last['accuracy']:.1f} [", f"{last['length']:.1f}"):
        assert figure in shown, shown
    done = subprocess.run(
        [sys.executable, "-m", "megatron_parallel_r1.cli", "report", str(whole)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.strip() == str(whole / "report.html")


@pytest.mark.slow
def test_single_stages_chain(whole: Path, tmp_path: Path) -> None:
    words = ("stages.cold_start.steps=2", "stages.rl.steps=1", "evaluation.problems=4")
    early = subprocess.run(command(tmp_path, "rl", str(RECIPE), *words), capture_output=True, text=True)
    assert early.returncode == 2
    assert "stage rl starts from cold_start, which is not done" in early.stderr
    assert not list(tmp_path.iterdir())
    run(tmp_path, "sft", str(RECIPE), *words)
    run(tmp_path, "rl", str(RECIPE), *words)
    assert (tmp_path / "mini/rl/model/model.safetensors").is_file()
    assert not (tmp_path / "mini/release").exists()
