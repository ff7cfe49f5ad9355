"""Progress on a terminal, in a log, and the time that it says is left."""

from __future__ import annotations

import io
from dataclasses import dataclass

import pytest
from rich.console import Console

from megatron_parallel_r1.report.progress import StageProgress


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def _log(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_a_log_gets_a_line_every_few_seconds_and_the_last_step() -> None:
    console, clock = Console(file=io.StringIO(), width=60), Clock()
    with StageProgress("rl_easy", 40, console=console, every_s=5, clock=clock) as progress:
        for step in range(1, 41):
            clock.now += 1
            metrics = {"reward": 0.5, "accuracy": 0.25, "parallel_ratio": None, "entropy": 1.0}
            progress.update(step, metrics)
    lines = _log(console)
    assert lines[0] == "rl_easy  step 1/40  reward 0.5  accuracy 25.0 %  parallel –  39 s left"
    assert [line.split()[2] for line in lines] == [f"{n}/40" for n in (1, 6, 11, 16, 21, 26, 31, 36, 40)]
    assert "\x1b" not in "".join(lines)


def test_time_left_follows_the_recent_pace() -> None:
    clock = Clock()
    console = Console(file=io.StringIO(), width=120)
    progress = StageProgress("sft", 100, done=40, console=console, clock=clock)
    assert progress.left_s is None
    clock.now = 20
    progress.update(50, {"loss": 1.25})
    assert progress.left_s == pytest.approx(100)
    assert _log(console) == ["sft  step 50/100  loss 1.25  1 min 40 s left"]
    for step in range(51, 91):
        clock.now += 0.5
        progress.update(step, {"loss": 1.0})
    assert progress.left_s == pytest.approx(5)


def test_a_terminal_shows_a_bar_and_its_last_state_stays() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=90, legacy_windows=False)
    clock = Clock()
    with StageProgress("a [red]name[/red]", 2, console=console, clock=clock) as progress:
        clock.now = 1
        progress.update(1, {"loss": 2.0})
        progress.update(2, {"loss": 1.0})
    text = "\n".join(_log(console))
    assert "a [red]name[/red]" in text
    assert "━" in text and "2/2" in text and "loss 1" in text


def test_an_error_inside_gives_the_terminal_back() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=90)
    with pytest.raises(ZeroDivisionError), StageProgress("sft", 2, console=console):
        raise ZeroDivisionError
    assert _log(console)[-1].endswith("\x1b[?25h")
