"""A whole run that rolls out ahead of its training: how stale it is, and that killing it changes nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_parallel_r1.config.reader import read_recipe
from megatron_parallel_r1.errors import UserError
from tests.curriculum.test_run import RECIPE, command, run, steps_of

# Shorter is better, which an untrained model can learn: every group has something to say.
WORDS = (
    "curriculum",
    str(RECIPE),
    "evaluation.problems=4",
    "stages.cold_start.steps=10",
    "stages.rl.steps=10",
    "stages.rl.save_every=1",
    "stages.rl.reward={name: length, settings: {limit: 80}}",
    "stages.rl.objective={correction: truncate}",
)


def metrics(out: Path) -> list[dict[str, Any]]:
    """Of each step, but for the times."""
    records = [json.loads(line) for line in (out / "mini/rl/metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in r.items() if not name.startswith("time")} for r in records]


def kill_after(out: Path, step: int, *words: str) -> None:
    """Kills a run some time after it has done that step of its last stage."""
    process = subprocess.Popen(
        command(out, *words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    began = time.monotonic()
    while max(steps_of(out / "mini/rl"), default=0) < step:
        assert process.poll() is None and time.monotonic() < began + 200
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 3])
def test_a_killed_run_ends_bit_for_bit_like_a_whole_one(tmp_path: Path, k: int) -> None:
    words = (*WORDS, f"stages.rl.max_off_policy_steps={k}")
    run(tmp_path / "whole", *words)
    for step in (2, 5, 6):
        kill_after(tmp_path / "killed", step, *words)
    run(tmp_path / "killed", *words)
    whole, killed = metrics(tmp_path / "whole"), metrics(tmp_path / "killed")
    assert killed == whole
    assert [record["staleness_max"] for record in whole] == [min(k, step) for step in range(10)]
    assert not any(record["groups_stale"] for record in whole)
    # Traces of older weights: not the engine's rounding, which is below 2e-5.
    assert max(record["mismatch_max"] for record in whole) > 1e-3
    ours, theirs = (load_file(tmp_path / o / "mini/release/model.safetensors") for o in ("whole", "killed"))
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.slow
def test_partial_rollouts_run_and_are_never_too_old(tmp_path: Path) -> None:
    run(tmp_path, *WORDS, "stages.rl.max_off_policy_steps=2", "stages.rl.partial_rollout=true")
    assert all(0 <= record["staleness_max"] <= 2 for record in metrics(tmp_path))


def test_partial_without_staleness_is_refused() -> None:
    with pytest.raises(UserError, match=r"partial_rollout needs a max_off_policy_steps of 1 at least"):
        read_recipe(RECIPE, ["stages.rl.partial_rollout=true"])
