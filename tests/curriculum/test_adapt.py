"""A run that went wrong goes on with other settings of what is not done, and only of that."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_parallel_r1.config.reader import read_recipe
from megatron_parallel_r1.curriculum.run import run
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.run.stage_loop import checkpoint_folder

RECIPE = Path(__file__).parent / "mini.yaml"
QUICK = (
    "evaluation=null",
    "stages.cold_start.evaluate=false",
    "stages.rl.evaluate=false",
    "stages.rl.steps=2",
)


def recipe_with(out: Path, *words: str):
    return read_recipe(RECIPE, [*QUICK, "stages.cold_start.steps=6", *words, f"out={out}"])


@pytest.mark.slow
def test_a_lower_rate_after_bad_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_parallel_r1.sft import loop
    from megatron_parallel_r1.train.trainer import NotFinite

    real = loop.sft_step
    calls = 0

    def fails_from_the_fourth(*args):
        nonlocal calls
        calls += 1
        if calls > 3:
            raise NotFinite("the loss is nan")
        return real(*args)

    monkeypatch.setattr(loop, "sft_step", fails_from_the_fourth)
    every_step = "stages.cold_start.save_every=1"
    with pytest.raises(UserError, match="3 times in a row"):
        run(recipe_with(tmp_path, every_step))
    folder = tmp_path / "mini/cold_start"
    # Nothing was saved between bad steps; the last good one may still have been on its way.
    saved = sorted(int(path.name[5:]) for path in checkpoint_folder(folder).glob("step_*"))
    assert saved and saved[-1] in (2, 3), saved
    monkeypatch.setattr(loop, "sft_step", real)
    lower = "stages.cold_start.optimizer.lr=1.0e-3"
    with pytest.raises(
        UserError, match=r"stages\.cold_start\.optimizer\.lr: .* change unfinished stages with --adapt"
    ):
        run(recipe_with(tmp_path, every_step, lower))
    (outcome,) = run(recipe_with(tmp_path, every_step, lower), adapt=True)
    assert (outcome.folder / "rl/model").is_dir()
    # Finished stages are what they are.
    with pytest.raises(UserError, match=r"optimizer\.lr"):
        run(recipe_with(tmp_path, every_step), adapt=True)


def test_a_stage_does_not_end_on_a_bad_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_parallel_r1.sft import loop
    from megatron_parallel_r1.train.trainer import NotFinite

    def fails(*args):
        raise NotFinite("the loss is nan")

    monkeypatch.setattr(loop, "sft_step", fails)
    with pytest.raises(UserError, match=r"step 2: its last step was skipped"):
        run(recipe_with(tmp_path, "stages.cold_start.steps=2"))
    assert not (tmp_path / "mini/cold_start/model").exists()
