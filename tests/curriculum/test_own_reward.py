"""A run with rewards, an advantage and a surrogate of the user's own: those of examples/own_reward.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_parallel_r1.config.reader import read_recipe
from megatron_parallel_r1.curriculum.run import run
from tests.curriculum.test_bad_input import RECIPE, fail

SHORT = ("stages.cold_start.steps=2", "stages.cold_start.evaluate=false", "stages.rl.evaluate=false")
OWN = "examples.own_reward"


def test_the_example_trains(tmp_path: Path) -> None:
    terms = [f"{{term: '{OWN}:{name}'}}" for name in ("balanced", "brief")]
    words = [
        f"stages.rl.reward={{components: [{{term: accuracy}}, {', '.join(terms)}], call_timeout_s: 600}}",
        f"stages.rl.objective={{advantage: '{OWN}:against_best', surrogate: '{OWN}:unclipped'}}",
        *("stages.rl.steps=4", "stages.rl.save_every=1", "stages.rl.keep_last=1"),
        *("stages.rl.keep_best=reward_brief", "evaluation=null", f"out={tmp_path}"),
    ]
    (outcome,) = run(read_recipe(Path(RECIPE), [*SHORT, *words]))
    stage = outcome.folder / "rl"
    records = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= record["reward_balanced"] <= 1 for record in records)
    briefs = [record["reward_brief"] for record in records]
    assert briefs[:2] == [0, 0] and max(briefs[2:]) < 0
    assert all(0 <= record["unscored"] < 1 and record["scoring_timeouts"] == 0 for record in records)
    kept = sorted((stage / "checkpoints").glob("step_*"))
    manifests = [json.loads((path / "manifest.json").read_text()) for path in kept]
    # Of equals the later is kept.
    assert [(manifest["step"], manifest["score"]) for manifest in manifests] == [(2, 0.0), (4, briefs[3])]


FAULTS = """
calls = 0

def late(judged, step):
    global calls
    calls += 1
    if calls > 12 + 4:  # in the second step, in its fifth trace
        raise LookupError("judge gone")
    return float(judged.length % 5)

def never(judged, step): return None
"""


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("late", "reward own_faults:late, step 2, trace 4: LookupError: judge gone, own_faults.py line 8;"),
        ("never", "stage rl, step 1: no trace has a reward, there is nothing to train on;"),
    ],
)
def test_a_failing_reward_ends_the_run_and_keeps_the_traces(
    capsys, monkeypatch, tmp_path: Path, name: str, says: str
) -> None:
    (tmp_path / "own_faults.py").write_text(FAULTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = (*SHORT, "evaluation=null", f"out={tmp_path}", f"stages.rl.reward={{name: 'own_faults:{name}'}}")
    shown = fail(capsys, monkeypatch, "curriculum", RECIPE, *words)
    kept = tmp_path / "mini/rl/unscored_traces.jsonl"
    saved = "; the stage's steps through 1 are saved" if name == "late" else ""
    assert shown == f"error: {says} the step's traces are in {kept}{saved}"
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [line["trace"] for line in lines] == list(range(12))
    assert all(line["problem"] and line["tokens"] and isinstance(line["response"], str) for line in lines)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("reward={name: 'no_such:f'}", "stages.rl.reward: reward no_such:f: cannot import no_such"),
        ("reward={name: 'json:dumps', call_timeout_s: 0}", "call_timeout_s: Input should be greater than 0"),
        ("objective={advantage: mine}", "objective.advantage: use one of grpo, dr_grpo, rloo, papo, or modu"),
        ("objective={advantage: 'json:loader'}", "objective.advantage json:loader: json has nothing"),
        ("objective={advantage: 'math:pow'}", "math:pow: it cannot be called as pow(rewards_PG)"),
        ("objective={surrogate: 'json:loads'}", "cannot be called as loads(logprobs_N, ratio_N, values)"),
        ("keep_best=fame", "keep_best 'fame' is none of reward, accuracy"),
    ],
)
def test_what_can_be_known_is_said_before_anything_is_written(
    capsys, monkeypatch, tmp_path: Path, override: str, named: str
) -> None:
    shown = fail(capsys, monkeypatch, "curriculum", RECIPE, f"out={tmp_path}", f"stages.rl.{override}")
    assert named in shown, shown
    assert not list(tmp_path.iterdir())


def test_a_column_that_a_reward_needs_is_missed_before_anything_is_written(
    capsys, monkeypatch, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "1+1?", "answer": "#### 2", "level": 1}\n')
    (tmp_path / "own_batch.py").write_text("def f(completions, topic, **kwargs): return [0.0] * len(topic)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    data = f"stages.rl.data={{source: dataset, name: openai/gsm8k, path: {tmp_path}/rows.jsonl}}"
    words = (data, "stages.rl.reward={name: 'own_batch:f'}", f"out={tmp_path}/out")
    shown = fail(capsys, monkeypatch, "curriculum", RECIPE, *words)
    assert "reward own_batch:f: there is no topic; take some of prompts, completions" in shown
    assert "level" in shown and not (tmp_path / "out").exists()
