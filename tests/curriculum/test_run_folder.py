"""What a run keeps of an interruption, and whose folder it is: all in this process, on a model of nothing."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_parallel_r1.config.reader import read_recipe
from megatron_parallel_r1.config.recipe import Recipe
from megatron_parallel_r1.curriculum.run import run
from megatron_parallel_r1.errors import ServersLost, Stopped, UserError
from megatron_parallel_r1.rl.rollout_worker import RolloutWorker
from megatron_parallel_r1.run import folder as run_folder
from megatron_parallel_r1.run import lock, sources, stage_loop
from megatron_parallel_r1.run.stage_loop import checkpoint_folder
from megatron_parallel_r1.sft import loop

RECIPE = Path(__file__).parent / "mini.yaml"
QUICK = ("evaluation=null", "stages.cold_start.evaluate=false", "stages.rl.evaluate=false")
STEPS = ("stages.cold_start.steps=6", "stages.rl.steps=3", "stages.cold_start.save_every=100")


def recipe_with(out: Path, *words: str) -> Recipe:
    return read_recipe(RECIPE, [*QUICK, *STEPS, "stages.rl.save_every=100", *words, f"out={out}"])


def saved(stage: Path) -> list[str]:
    return sorted(path.name for path in checkpoint_folder(stage).glob("step_*"))


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], Any]) -> None:
    """Does something in the middle of an SFT step, once."""
    real, calls = loop.sft_step, iter(range(1, 10**6))

    def acts(*arguments: Any) -> Any:
        if next(calls) == step:
            action()
        return real(*arguments)

    monkeypatch.setattr(loop, "sft_step", acts)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody disturbed."""
    (outcome,) = run(recipe_with(tmp_path_factory.mktemp("whole")))
    assert not list(outcome.folder.glob("run.lock*"))
    return outcome.folder


def assert_equal(folder: Path, whole: Path) -> None:
    for name in ("cold_start/model", "rl/model", "release"):
        ours, theirs = (load_file(run / name / "model.safetensors") for run in (folder, whole))
        assert ours.keys() == theirs.keys()
        assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_after_the_step(
    tmp_path: Path, whole: Path, monkeypatch, capsys: pytest.CaptureFixture, number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    at_step(monkeypatch, 2, lambda: os.kill(os.getpid(), number))
    with pytest.raises(Stopped, match=r"stage cold_start: stopped by a signal after step [23], saved"):
        run(recipe_with(tmp_path))
    assert signal.getsignal(number) is before
    assert f"{number.name}: the run saves after this step and stops; a second one" in capsys.readouterr().err
    folder = tmp_path / "mini"
    assert saved(folder / "cold_start") in (["step_000002"], ["step_000003"])
    assert not list(folder.glob("run.lock*"))
    monkeypatch.undo()
    if number is signal.SIGINT:
        run(recipe_with(tmp_path))
        assert_equal(folder, whole)


def test_a_signal_in_the_last_step_ends_the_run_with_the_stage(tmp_path: Path, monkeypatch) -> None:
    at_step(monkeypatch, 6, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Stopped, match="stage cold_start: stopped by a signal after its last step, saved"):
        run(recipe_with(tmp_path))
    assert (tmp_path / "mini/cold_start/model").is_dir() and not (tmp_path / "mini/rl").exists()


def test_checkpoints_by_the_clock_change_no_number(tmp_path: Path, whole: Path, monkeypatch) -> None:
    now = 0.0
    monkeypatch.setattr(stage_loop, "monotonic", lambda: now)

    def passes() -> None:
        nonlocal now
        now += 20 * 60

    at_step(monkeypatch, 3, passes)
    kept: list[str] = []
    real = stage_loop.StageLoop.end

    def end(self: Any, step: int, *rest: Any) -> None:
        real(self, step, *rest)
        if step == 5:
            self._checkpoints.settle()
            kept.extend(saved(tmp_path / "mini/cold_start"))

    monkeypatch.setattr(stage_loop.StageLoop, "end", end)
    (outcome,) = run(recipe_with(tmp_path))
    assert kept == ["step_000003"]
    assert_equal(outcome.folder, whole)


def test_lost_servers_cost_no_finished_step(tmp_path: Path, whole: Path, monkeypatch) -> None:
    real = RolloutWorker._generate

    def fails(self: RolloutWorker, step: int, *rest: Any, **named: Any) -> Any:
        made = real(self, step, *rest, **named)  # problems are drawn, and their responses lost
        if step == 3:
            raise ServersLost("no rollout server usable for 300 s")
        return made

    monkeypatch.setattr(RolloutWorker, "_generate", fails)
    with pytest.raises(ServersLost, match="for 300 s; the stage's steps through 2 are saved"):
        run(recipe_with(tmp_path))
    assert saved(tmp_path / "mini/rl") == ["step_000002"]
    monkeypatch.undo()
    (outcome,) = run(recipe_with(tmp_path))
    assert_equal(outcome.folder, whole)


def test_a_folder_in_use_is_left_alone(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "mini"
    refused: list[str] = []

    def second_command() -> None:
        before = sorted(folder.rglob("*"))
        with pytest.raises(UserError, match="is in use by process") as error:
            lock._acquire(folder, lock.stage_lock("cold_start"))
        refused.append(str(error.value))
        assert sorted(folder.rglob("*")) == before

    at_step(monkeypatch, 2, second_command)
    run(recipe_with(tmp_path), only={"cold_start"})
    assert len(refused) == 1 and (folder / "cold_start/model").is_dir()


def test_only_fresh_deletes_what_has_no_checkpoint_yet(tmp_path: Path, monkeypatch) -> None:
    def crash() -> None:
        raise KeyboardInterrupt

    at_step(monkeypatch, 4, crash)
    with pytest.raises(KeyboardInterrupt):
        run(recipe_with(tmp_path))
    monkeypatch.undo()
    folder = tmp_path / "mini"
    assert len((folder / "cold_start/metrics.jsonl").read_text().splitlines()) == 3
    (folder / "notes.txt").write_text("mine")
    changed = recipe_with(tmp_path, "stages.cold_start.examples_per_step=4")
    with pytest.raises(UserError, match=r"stages\.cold_start\.examples_per_step: 8 then, 4 now"):
        run(changed)
    first = run_folder.RunState.read(folder).id
    run(recipe_with(tmp_path), only={"cold_start"})  # begins again, in the same place
    assert [json.loads(line)["step"] for line in (folder / "cold_start/metrics.jsonl").open()] == [
        *range(1, 7)
    ]
    assert (folder / "notes.txt").is_file()
    second = run_folder.RunState.read(folder).id
    run(changed, only={"cold_start"}, fresh=True)
    assert not (folder / "notes.txt").exists()
    assert len({first, second, run_folder.RunState.read(folder).id}) == 3 and first


def test_data_that_changed_are_noticed(tmp_path: Path, monkeypatch) -> None:
    rows = [{"q": f"What is {n} plus 1?", "r": f"{n} {n} 1", "a": "1"} for n in range(2, 9)]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = "columns: {prompt: q, response: r, answer: a}"
    data = f"stages.cold_start.data={{source: dataset, name: custom, path: {file}, {columns}}}"
    at_step(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Stopped):
        run(recipe_with(tmp_path, data), only={"cold_start"})
    sources.read_examples.cache_clear()  # as in another process
    with file.open("a") as lines:
        lines.write('{"q": "What is 9 plus 1?", "r": "9 1", "a": "1"}\n')
    with pytest.raises(
        UserError, match=r"stage cold_start: its data have changed .*7 items then, 8 now.*--adapt"
    ):
        run(recipe_with(tmp_path, data), only={"cold_start"})
    run(recipe_with(tmp_path, data), only={"cold_start"}, adapt=True)
    # What is done is done.
    trained_on = run_folder.RunState.read(tmp_path / "mini").data["cold_start"]
    assert trained_on.items == 8
    sources.read_examples.cache_clear()
    file.write_text(file.read_text() + '{"q": "What is 3 plus 3?", "r": "3 3", "a": "6"}\n')
    run(recipe_with(tmp_path, data), only={"cold_start"})
    assert run_folder.RunState.read(tmp_path / "mini").data["cold_start"] == trained_on
    (tmp_path / "mini/state.json").write_text('{"id": ')
    with pytest.raises(UserError, match=r"mini/state\.json is damaged; .*--fresh"):
        run(recipe_with(tmp_path, data), only={"cold_start"})
