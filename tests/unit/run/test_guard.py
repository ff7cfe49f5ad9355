"""Steps that go wrong are left out and kept, warn or end the run; a stage ends where its metric stands."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_parallel_r1.config.early_stopping import EarlyStopping
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.run.guard import WINDOW, Guard, has_collapsed
from megatron_parallel_r1.train.trainer import NotFinite

STAGE: Any = SimpleNamespace(name="rl", max_bad_steps=3)


@dataclass(frozen=True)
class FakeBatch:
    """What a step trained on."""

    tokens: tuple[int, ...] = ()

    def records(self) -> list[dict[str, Any]]:
        return [{"tokens": self.tokens}]


def train(guard: Guard, step: int, error: Exception | None = None, batch: FakeBatch = FakeBatch()) -> None:
    """A step that raises `error`."""
    with guard.skip_if_not_finite(step, batch):
        if error is not None:
            raise error


NAN = NotFinite("the loss is nan")


def test_a_bad_step_is_skipped_and_its_batch_kept(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    guard = Guard(STAGE, tmp_path, done=0)
    train(guard, 1)
    assert guard.bad_in_a_row == 0
    train(guard, 2, NAN, FakeBatch((1, 2)))
    assert guard.bad_in_a_row == 1
    (kept,) = [json.loads(line) for line in (tmp_path / "bad_steps.jsonl").read_text().splitlines()]
    assert kept == {"step": 2, "error": "the loss is nan", "batch": [{"tokens": [1, 2]}]}
    assert "stage rl, step 2: the loss is nan; the step is skipped" in capsys.readouterr().err


def test_bad_steps_in_a_row_end_the_run_and_a_good_one_between_counts(tmp_path: Path) -> None:
    guard = Guard(STAGE, tmp_path, done=0)
    for step in (1, 2):
        train(guard, step, NAN)
    train(guard, 3)
    for step in (4, 5):
        train(guard, step, NAN)
    with pytest.raises(UserError, match=r"stage rl, step 6: the loss is nan, 3 times in a row"):
        train(guard, 6, NAN)
    assert len((tmp_path / "bad_steps.jsonl").read_text().splitlines()) == 5


def test_a_guard_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rewards = [-1.0] * WINDOW + [0.5] * WINDOW
    first = Guard(STAGE, tmp_path, done=0)
    for step, reward in enumerate(rewards, 1):
        first.watch(step, {"reward": reward})
    with pytest.raises(UserError):
        for step in (21, 22, 23):
            train(first, step, NAN)
    again = Guard(STAGE, tmp_path, done=21)
    again.restore(json.loads(json.dumps(first.state())))
    assert len((tmp_path / "bad_steps.jsonl").read_text().splitlines()) == 1  # step 22 is to come again
    capsys.readouterr()
    for step in range(22, 42):
        again.watch(step, {"reward": -1.0})
    assert "the reward has lost" in capsys.readouterr().err


def test_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        train(Guard(STAGE, tmp_path, done=0), 1, ZeroDivisionError())


def test_collapses_warn_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    guard = Guard(STAGE, tmp_path, done=0)
    rewards = [-1.0] * WINDOW + [0.5] * WINDOW + [-1.0] * 2 * WINDOW
    for step, reward in enumerate(rewards, 1):
        guard.watch(step, {"reward": reward, "entropy": 0.001 if step > 25 else 1.0})
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2 and "the reward has lost" in warnings[0] and "the entropy is" in warnings[1]


@pytest.mark.parametrize(
    ("values", "fallen"),
    [
        ([0.0] * 10 + [1.0] * 10 + [0.4] * 10, True),
        ([0.0] * 10 + [1.0] * 10 + [0.6] * 10, False),
        ([0.0] * 10 + [0.05] * 10 + [0.0] * 10, False),
        ([0.0] * 10 + [1.0] * 10 + [0.0] * 9, False),
        ([0.8] * 10 + [-1.0] * 60, True),
        ([0.5] * 15 + [0.6] * 15 + [-1.0] * 60, True),
        ([0.8] * 20 + [0.75] * 40, False),
        ([8.0] * 20 + [7.5] * 40, False),
    ],
)
def test_a_fall_is_more_than_half_of_a_clear_gain_or_clearly_below_the_start(
    values: list[float], fallen: bool
) -> None:
    assert has_collapsed(values) is fallen


@pytest.mark.parametrize(
    ("settings", "values", "reached"),
    [
        ({}, [0.0, 0.0, 1.0, 1.0], False),
        ({}, [1.0, 1.0, 1.0, 1.0], True),
        ({}, [1.0, 1.0, 1.0], False),
        ({"min_delta": 0.5}, [1.0, 1.0, 1.4, 1.4], True),
        ({"mode": "min"}, [2.0, 2.0, 1.0, 1.0], False),
        ({"mode": "min"}, [1.0, 1.0, 2.0, 2.0], True),
        ({"min_steps": 6}, [1.0] * 5, False),
        ({"min_steps": 6}, [1.0] * 6, True),
    ],
)
def test_a_plateau_by_hand(settings: dict[str, Any], values: list[float], reached: bool) -> None:
    assert EarlyStopping(window=2, **settings).reached(values, len(values)) is reached
