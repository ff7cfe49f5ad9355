"""GRPO on the embedded task with real SGLang servers, against the native engine under the same settings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.engines.servers import START_SECONDS, python_of
from tests.unit.rollout.serving.launched import Launched, assert_gone, launched

pytestmark = [pytest.mark.engines, pytest.mark.slow, pytest.mark.xdist_group("rl")]

ROOT = Path(__file__).parents[2]
DEMO, RECIPE = ROOT / "recipes" / "tiny" / "demo.yaml", ROOT / "tests" / "engines" / "rl.yaml"
# As rl.yaml has them.
PROMPTS, SAMPLES, STEPS = 4, 4, 20
# The servers ask for it.
KEY = "k-3c1f9ad2"
# The promise of docs/architecture.md for float32: rollout and trainer agree to this, in nats.
EXACT = 2e-5


@dataclass(frozen=True, slots=True)
class Run:
    steps: list[dict[str, Any]]
    evaluation: dict[str, Any]
    output: str

    @property
    def mismatch(self) -> float:
        return max(step["mismatch_max"] for step in self.steps)

    def show(self, name: str) -> None:
        def mean(name: str) -> float:
            return sum(step[name] for step in self.steps) / len(self.steps)

        print(
            f"\n{name}: {self.evaluation['accuracy']:.3f} ± {self.evaluation['ci95']:.3f}, mismatch "
            f"{self.mismatch:.1e}, rollout {mean('time_rollout_s'):.1f} s and training "
            f"{mean('time_train_s'):.1f} s a step"
        )
        if "sync_time_s" in self.steps[0]:
            lost = sum(step["servers_lost"] for step in self.steps)
            retries = sum(step["server_retries"] for step in self.steps)
            print(
                f"  {mean('server_cached_share'):.1%} of the tokens cached, {retries:.0f} retries, "
                f"{lost:.0f} servers lost, sync {mean('sync_time_s'):.2f} s, {mean('sync_mb_s'):.0f} MB/s"
            )


def command(kind: str, recipe: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "megatron_parallel_r1.cli", kind, str(recipe), *words]


@dataclass(frozen=True, slots=True)
class Servers:
    """Two, that `serve-rollout` started with the weights of a cold start."""

    supervisor: Launched
    urls: list[str]
    pids: list[int]
    file: Path

    @property
    def key(self) -> str:
        return f"rollout.key_file={self.file.with_name('key')}"

    @property
    def words(self) -> tuple[str, ...]:
        return "rollout.engine=sglang", f"rollout.urls_file={self.file}", self.key


@pytest.fixture(scope="module")
def cold_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned the format and some of the arithmetic."""
    out = tmp_path_factory.mktemp("cold")
    few = ("stages.arithmetic.steps=150", "stages.cold_start.steps=120", "stages.cold_start.evaluate=false")
    for stage in ("arithmetic", "cold_start"):
        words = command("sft", DEMO, f"out={out}", "--stage", stage, *few)
        done = subprocess.run(words, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stdout + done.stderr
    return out / "tiny" / "cold_start" / "model"


@pytest.fixture(scope="module")
def servers(cold_start: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """With the plugin; a run in mode replay does not mind it."""
    place = tmp_path_factory.mktemp("servers")
    settings = {
        "checkpoint": cold_start,
        "python": python_of("sglang"),
        "servers": 2,
        "port": 0,
        "device": "cpu",
    }
    (place / "key").write_text(f"{KEY}\n")
    more = {"isolated": True, "log_dir": place, "urls_file": place / "urls", "key_file": place / "key"}
    with launched(**settings, **more) as supervisor:
        healthy = sorted(supervisor.next_healthy(START_SECONDS) for _ in range(2))
        urls, pids = [url for _, url, _ in healthy], [pid for *_, pid in healthy]
        yield Servers(supervisor, urls, pids, place / "urls")
        assert all(KEY not in log.read_text() for log in place.glob("server-*.log"))


def start(model: Path, out: Path, *words: str) -> subprocess.Popen[str]:
    overrides = (f"model.path={model}", f"tokenizer.path={model}", f"out={out}", *words)
    out.mkdir(exist_ok=True)
    with (out / "log").open("a") as log:
        return subprocess.Popen(command("rl", RECIPE, *overrides), stdout=log, stderr=log, text=True)


def ended(process: subprocess.Popen[str]) -> int:
    try:
        return process.wait(timeout=1800)
    finally:
        process.kill()


def finished(process: subprocess.Popen[str], out: Path, count: int = STEPS) -> Run:
    assert ended(process) == 0, (out / "log").read_text()
    steps = steps_of(out)
    assert [step["step"] for step in steps] == list(range(1, count + 1))
    assert all(step["groups"] == PROMPTS and not step["groups_dropped"] for step in steps)
    evaluation = json.loads((out / "rl" / "eval.jsonl").read_text())
    return Run(steps, evaluation, (out / "log").read_text())


def steps_of(out: Path) -> list[dict[str, Any]]:
    """Whole lines alone: the run may be writing the next one."""
    file = out / "rl" / "rl" / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def in_the_midst(process: subprocess.Popen[str], out: Path, step: int, strike: Callable[[], None]) -> None:
    """Strikes in the middle of the rollout that follows a step."""
    while len(steps_of(out)) < step and process.poll() is None:
        time.sleep(0.1)
    if process.poll() is None:
        time.sleep(0.5 * steps_of(out)[-1]["time_rollout_s"])
        strike()


def run(model: Path, out: Path, *words: str) -> Run:
    return finished(start(model, out, *words), out)


def as_good(one: Run, other: Run) -> bool:
    """Whether two accuracies could be of one model: their 95 % intervals meet."""
    apart = abs(one.evaluation["accuracy"] - other.evaluation["accuracy"])
    return apart <= one.evaluation["ci95"] + other.evaluation["ci95"]


@pytest.mark.parametrize("mode", ["replay", "isolated"])
def test_a_server_teaches_as_the_native_engine(
    cold_start: Path, mode: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    python_of("sglang")
    # One server is the run's own, and gives its memory up while the trainer learns.
    where = ["rollout.servers=1", "rollout.colocated=true"]
    if mode == "isolated":
        servers = request.getfixturevalue("servers")
        where = [f"rollout.urls=[{servers.urls[0]}]", servers.key]
    wanted = run(cold_start, tmp_path / "native", f"thinking.mode={mode}")
    found = run(cold_start, tmp_path / "server", f"thinking.mode={mode}", "rollout.engine=sglang", *where)
    wanted.show(f"native, {mode}")
    found.show(f"SGLang, {mode}")
    assert found.mismatch <= EXACT and wanted.mismatch <= EXACT
    assert max(step["sync_difference"] for step in found.steps) <= EXACT
    assert found.steps[0]["parallel_ratio"] > 0.1
    # The same weights and seeds draw the same traces, but where rounding breaks a tie.
    for name, most in (("accuracy", 1.0), ("group_pass", 1.0), ("length", 400.0)):
        ties = 2 * most / (PROMPTS * SAMPLES)
        assert abs(found.steps[0][name] - wanted.steps[0][name]) <= ties, name
    assert as_good(found, wanted)
    early = sum(step["accuracy"] for step in found.steps[:5]) / 5
    assert found.evaluation["accuracy"] > early, "it did not learn"


def test_one_of_two_servers_killed_costs_no_trace(cold_start: Path, servers: Servers, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    process = start(cold_start, out, *servers.words)
    in_the_midst(process, out, 10, lambda: os.kill(servers.pids[1], signal.SIGKILL))
    found = finished(process, out)
    found.show("SGLang, two servers, one killed at step 10")
    assert found.mismatch <= EXACT
    assert sum(step["servers_lost"] for step in found.steps) >= 1
    assert found.steps[0]["servers_up"] == 2
    assert servers.supervisor.next_line(60) == "server 1 ended with status 137; restarting it"
    assert servers.supervisor.next_healthy(START_SECONDS)[:2] == (1, servers.urls[1])


def test_a_run_whose_servers_are_all_gone_can_be_gone_on_with(
    cold_start: Path, servers: Servers, tmp_path: Path
) -> None:
    out = tmp_path / "gone"
    few = ("stages.rl.steps=6", "stages.rl.save_every=1")
    served = (*servers.words, "rollout.patience_s=10")
    process = start(cold_start, out, *few, *served)
    family = servers.supervisor.family()
    in_the_midst(process, out, 3, servers.supervisor.process.kill)
    assert ended(process) == 2
    assert_gone(family)
    output = (out / "log").read_text()
    assert "no rollout server" in output.splitlines()[-1] and "Traceback" not in output, output
    assert 3 <= len(steps_of(out)) < 6
    # With another engine: both draw from the same distribution.
    assert finished(start(cold_start, out, *few), out, 6).mismatch <= EXACT
