"""Evaluation while a stage trains: it changes no training, and survives kills and stops amid it."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_parallel_r1.config.reader import read_recipe
from megatron_parallel_r1.curriculum.run import run
from megatron_parallel_r1.errors import Stopped, UserError
from megatron_parallel_r1.run import stage_loop
from tests.curriculum.test_many_processes import run as run_processes
from tests.curriculum.test_run import RECIPE, command

SFT = (
    "stages.cold_start.evaluate_during={every: 4, sets: {easy: {data: {source: embedded, kind: easy}, "
    "problems: 4, samples_per_problem: 2, modes: [parallel, majority@2]}, "
    "hard: {data: {source: embedded, kind: hard}, problems: 3, thinking: {temperature: 0.5}}}}"
)
RL = (
    "stages.rl.evaluate_during={every: 2, sets: {hard: {data: {source: embedded, kind: hard}, "
    "problems: 24, samples_per_problem: 4}}}"
)
SHORT = (
    *("evaluation=null", "stages.cold_start.evaluate=false", "stages.rl.evaluate=false"),
    *("stages.cold_start.steps=6", "stages.rl.steps=3", "stages.cold_start.optimizer.lr=1.0e-3"),
    "stages.rl.reward={name: length, settings: {limit: 80}}",
)


def train(out: Path, *words: str) -> Path:
    (outcome,) = run(read_recipe(RECIPE, [*SHORT, *words, f"out={out}"]))
    return outcome.folder


def records(folder: Path, stage: str) -> list[dict[str, Any]]:
    """The evaluations of a stage, without their times."""
    lines = (folder / stage / "evaluations.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "time_s"} for line in lines]


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "release/model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("whole"), SFT, RL)


def test_it_evaluates_before_between_and_after_the_steps(whole: Path) -> None:
    sft, rl = records(whole, "cold_start"), records(whole, "rl")
    pairs = [("easy", "parallel"), ("easy", "majority@2"), ("hard", "parallel")]
    assert [(r["step"], r["set"], r["mode"]) for r in sft] == [
        (n, *pair) for n in (0, 4, 6) for pair in pairs
    ]
    assert [r["step"] for r in rl] == [0, 2, 3]
    assert {(r["kind"], r["stage"]) for r in sft} == {("evaluation", "cold_start")}
    assert (sft[0]["problems"], sft[0]["samples"]) == (4, 2)
    for record in (*sft, *rl):
        assert 0 <= record["accuracy_low"] <= record["accuracy"] <= record["accuracy_high"] <= 1
        assert 0 < record["critical_length"] <= record["length"]
    assert {"mean@2", "pass@2", "maj@2"} <= sft[0].keys() and {"mean@4", "pass@2", "pass@4"} <= rl[0].keys()
    assert sft[1]["parallel_ratio"] == 0
    assert not list(whole.glob("*/.evaluating")) and not list(whole.glob("*/checkpoints"))
    assert len({r["length"] for r in rl}) == 3, "each is of other weights"


@pytest.mark.parametrize("ahead", [0, 1])
def test_it_changes_no_training(whole: Path, tmp_path: Path, ahead: int) -> None:
    word = f"stages.rl.max_off_policy_steps={ahead}"
    evaluated = train(tmp_path / "evaluated", SFT, RL, word) if ahead else whole
    assert weights(evaluated) == weights(train(tmp_path / "plain", word))
    assert records(evaluated, "rl")[0] == records(whole, "rl")[0]


def test_a_stop_between_two_sets_costs_nothing(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    take_in = stage_loop.StageLoop._take_in

    def watch(loop: stage_loop.StageLoop, record: dict[str, Any]) -> None:
        take_in(loop, record)
        seen.append(record["set"])

    with monkeypatch.context() as patch:
        patch.setattr(stage_loop.StageLoop, "_take_in", watch)
        patch.setattr(stage_loop, "stop_signal_pending", lambda: len(seen) == 5)
        with pytest.raises(Stopped, match="stopped by a signal after step 4, saved"):
            train(tmp_path, SFT, RL)
    folder = tmp_path / "mini"
    assert records(folder, "cold_start") == records(whole, "cold_start")[:5]
    train(tmp_path, SFT, RL)
    assert records(folder, "cold_start") == records(whole, "cold_start")
    assert records(folder, "rl") == records(whole, "rl") and weights(folder) == weights(whole)


# Runs the command line; kills itself at the seventh response of the n-th evaluation that it begins.
KILLED = """
import os, runpy, signal, sys
from megatron_parallel_r1.evaluation.evaluator import RunningScore
left, begin, finish = int(sys.argv.pop(1)), RunningScore.__init__, RunningScore.finish
def count(self, records):
    global left
    begin(self, records)
    left -= 1
def kill(self, place, record):
    found = finish(self, place, record)
    if left == 0 and found[0] == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return found
RunningScore.__init__, RunningScore.finish = count, kill
runpy.run_module("megatron_parallel_r1.cli", run_name="__main__")
"""


def test_kills_amid_evaluations_cost_nothing(whole: Path, tmp_path: Path) -> None:
    words = command(tmp_path, "curriculum", str(RECIPE), *SHORT, SFT, RL)
    folder = tmp_path / "mini"
    # Before the first step of RL, after nine evaluations of SFT; then after the second step.
    for step, evaluations in ((0, 10), (2, 2)):
        script = [sys.executable, "-c", KILLED, str(evaluations), *words[3:]]
        killed = subprocess.run(script, stdout=subprocess.DEVNULL, timeout=900)
        assert killed.returncode == -signal.SIGKILL
        (drawn,) = (folder / "rl/.evaluating" / f"step_{step:06d}").glob("records/*/copy0.jsonl")
        assert len(drawn.read_text().splitlines()) == 7
        assert [r["step"] for r in records(folder, "rl")] == [n for n in (0, 2) if n < step]
    # A response that is on disk is not drawn again.
    lines = drawn.read_text().split("\n")
    lines[0] = json.dumps(json.loads(lines[0]) | {"tokens": 10**6})
    drawn.write_text("\n".join(lines))
    done = subprocess.run(words, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert records(folder, "cold_start") == records(whole, "cold_start")
    ours, theirs = records(folder, "rl"), records(whole, "rl")
    assert ours[1]["length"] > 10**4 > theirs[1]["length"]
    different = {"length", "saved"}
    assert [{k: v for k, v in r.items() if k not in different} for r in ours] == [
        {k: v for k, v in r.items() if k not in different} for r in theirs
    ]
    assert weights(folder) == weights(whole)


def test_a_fresh_run_in_the_folder_evaluates_anew(tmp_path: Path) -> None:
    for seed in (3, 4):
        (outcome,) = run(
            read_recipe(RECIPE, [*SHORT, SFT, f"seed={seed}", f"out={tmp_path}", "stages.rl.steps=1"]),
            only=["cold_start"],
            fresh=True,
        )
        assert [r["step"] for r in records(outcome.folder, "cold_start")] == [0] * 3 + [4] * 3 + [6] * 3


def test_the_best_checkpoint_and_the_end_may_follow_an_evaluation(tmp_path: Path) -> None:
    during = SFT.replace("every: 4", "every: 1")
    words = (
        *(during, "stages.cold_start.steps=8", "stages.cold_start.save_every=5"),
        "stages.cold_start.keep_best=evaluation/hard/parallel/length",
        "stages.cold_start.keep_last=1",
        "stages.cold_start.early_stopping="
        "{metric: evaluation/easy/parallel/accuracy, window: 2, min_steps: 5}",
    )
    folder = train(tmp_path, *words)
    lengths = {r["step"]: r["length"] for r in records(folder, "cold_start") if r["set"] == "hard"}
    assert max(lengths) == 5, "an accuracy of 0 does not rise, and five steps are made in any case"
    best = min(range(1, 6), key=lambda step: (lengths[step], -step))
    kept = sorted(path.name for path in (folder / "cold_start/checkpoints").glob("step_*"))
    assert kept == sorted({f"step_{best:06d}", "step_000005"})


def test_what_is_evaluated_is_not_trained_on(tmp_path: Path) -> None:
    rows = [{"problem": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(6)]
    trained, evaluated = tmp_path / "trained.jsonl", tmp_path / "evaluated.jsonl"
    trained.write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    evaluated.write_text("".join(json.dumps(row) + "\n" for row in rows[3:]))
    source = "{{source: dataset, name: custom, path: {}, columns: {{prompt: problem, answer: answer}}}}"
    words = [
        *(*SHORT, f"stages.rl.data={source.format(trained)}", f"out={tmp_path}"),
        f"stages.rl.evaluate_during={{sets: {{own: {{data: {source.format(evaluated)}}}}}}}",
        "tokenizer={kind: bpe, vocab_size: 300, texts: [" + source.format(trained) + "]}",
    ]
    with pytest.raises(
        UserError, match=r"stage rl, evaluate_during\.sets\.own: stage rl trains on 1 of its 3"
    ):
        run(read_recipe(RECIPE, words), only=["rl"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            "modes: [majority@4], samples_per_problem: 6",
            "needs a samples_per_problem that is a multiple of 4",
        ),
        ("modes: [fast]", "mode 'fast': unknown"),
        ("thinking: {mode: causal}", "thinking.mode is the stage's in every set"),
        ("thinking: {heat: 1}", "stage rl: evaluate_during.sets.own"),
        ("thinking: {temperature: 0}, samples_per_problem: 2", "at temperature 0 all samples"),
    ],
)
def test_bad_sets_are_refused_when_the_recipe_is_read(settings: str, message: str) -> None:
    word = f"stages.rl.evaluate_during={{sets: {{own: {{data: {{source: embedded}}, {settings}}}}}}}"
    with pytest.raises(UserError, match=message):
        read_recipe(RECIPE, [word])


def test_only_what_is_evaluated_can_be_followed() -> None:
    with pytest.raises(UserError, match="keep_best 'evaluation/hard/sequential/accuracy' is none of"):
        read_recipe(RECIPE, [RL, "stages.rl.keep_best=evaluation/hard/sequential/accuracy"])


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["parallel.tensor=2", "parallel.sharded_optimizer=true"])
def test_two_processes_find_what_one_does(whole: Path, tmp_path: Path, layout: str) -> None:
    done = run_processes(tmp_path, 2, "curriculum", str(RECIPE), *SHORT, SFT, RL, layout)
    assert done.returncode == 0, done.stdout + done.stderr
    for stage in ("cold_start", "rl"):
        ours, theirs = records(tmp_path / "mini", stage), records(whole, stage)
        assert [(r["step"], r["set"], r["mode"]) for r in ours] == [
            (r["step"], r["set"], r["mode"]) for r in theirs
        ]
    # The weights of the first evaluation are the same, and each draw has its own seed.
    assert records(tmp_path / "mini", "cold_start")[:3] == records(whole, "cold_start")[:3]
    assert done.stdout.count("cold_start  step 0  easy parallel") == 1
