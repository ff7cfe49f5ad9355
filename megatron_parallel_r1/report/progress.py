"""Live progress of a stage or an evaluation: bars on a terminal, in a log a line a minute at most."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_parallel_r1.utils.formats import count, duration, number, percent

METRICS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("loss", "loss", number),
    ("reward", "reward", number),
    ("accuracy", "accuracy", percent),
    ("counted", "of the first", count),
    ("parallel_ratio", "parallel", percent),
    ("kl", "KL to the reference", number),
    ("kl_old", "KL", number),
    ("grad_norm", "gradient", number),
    ("rollout_tokens_per_second", "rollout tok/s", number),
    ("training_tokens_per_second", "training tok/s", number),
    ("memory_gb", "memory GB", number),
)
REDRAW_S = 0.1
LINE_S = 60.0
RECENT_STEPS = 20


class StageProgress:
    """Shows a stage's step, metrics and time left; a context manager around the steps.

    Args:
        stage: its name.
        steps: its last step.
        done: steps that a resumed stage has already done.
        console: a terminal gets a bar, anything else lines.
        every_s: seconds between two lines of a log; the first and the last step always have one.
        clock: seconds, monotonic.
        steps_after: steps of the later stages, in steps of this one; None: unknown. 0: there are none.
    """

    def __init__(
        self,
        stage: str,
        steps: int,
        *,
        done: int = 0,
        console: Console | None = None,
        every_s: float = LINE_S,
        clock: Callable[[], float] = time.monotonic,
        steps_after: float | None = 0,
    ) -> None:
        self._stage, self._steps, self._step = stage, steps, done
        self._console = console or Console()
        self._clock = clock
        self._steps_after = steps_after
        self._numbers = ""
        self._recent = deque([(done, clock())], maxlen=RECENT_STEPS)
        self._drawn_at = float("-inf")
        bar = self._console.is_terminal and not self._console.is_dumb_terminal
        self._live = Live(console=self._console, auto_refresh=False) if bar else None
        self._whole: StageProgress | None = None
        self._part: StageProgress | None = None
        self._every_s = every_s
        self._pause_s = REDRAW_S if bar else every_s

    @property
    def left_s(self) -> float | None:
        """Seconds to the end of the stage at the pace of the recent steps; None before the first."""
        pace = self._pace_s
        return None if pace is None else pace * (self._steps - self._step)

    @property
    def all_left_s(self) -> float | None:
        """Seconds to the end of the last stage; None where unknown."""
        if self.left_s is None or self._pace_s is None or self._steps_after is None:
            return None
        return self.left_s + self._pace_s * self._steps_after

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Shows a completed step with those numbers of its record `metrics` that are in `METRICS`."""
        self._step = step
        self._recent.append((step, self._clock()))
        self._numbers = "  ".join(
            f"{label} {form(metrics[key])}" for key, label, form in METRICS if key in metrics
        )
        if step >= self._steps or self._clock() - self._drawn_at >= self._pause_s:
            self._drawn_at = self._clock()
            self._draw()

    @contextmanager
    def part(self, name: str, steps: int, done: int = 0) -> Iterator[StageProgress]:
        """Shows the progress of an evaluation below the stage's; its time does not count as a step's."""
        began = self._clock()
        part = StageProgress(
            *(f"{self._stage}  {name}", steps),
            done=done,
            console=self._console,
            every_s=self._every_s,
            clock=self._clock,
        )
        part._live, part._whole, self._part = None, self, part
        part._pause_s = self._pause_s
        # A short evaluation has no line of its own.
        part._drawn_at = began
        try:
            yield part
        finally:
            self._part = None
            spent = self._clock() - began
            self._recent = deque(((step, then + spent) for step, then in self._recent), maxlen=RECENT_STEPS)

    def note(self, line: str) -> None:
        """Prints a line that stays, above the bar."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> StageProgress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._live.update(self._bar(), refresh=True)
            self._live.stop()

    @property
    def _pace_s(self) -> float | None:
        (first, began), (last, now) = self._recent[0], self._recent[-1]
        return None if last == first else (now - began) / (last - first)

    def _draw(self) -> None:
        if self._whole is not None and self._whole._live is not None:
            self._whole._draw()
            return
        if self._live:
            self._live.update(self._bar(), refresh=True)
            return
        if self._whole is not None and self._step >= self._steps:
            return  # its result follows
        line = f"{self._stage}  step {self._step}/{self._steps}  {self._numbers}  {self._time_left()}"
        self.note(line.rstrip())

    def _bar(self) -> RenderableType:
        row = Table.grid(padding=(0, 2), expand=True)
        row.add_column(no_wrap=True, style="bold", overflow="ellipsis")
        row.add_column(ratio=1)
        row.add_column(no_wrap=True, justify="right")
        row.add_column(no_wrap=True, style="cyan")
        bar = ProgressBar(total=max(1, self._steps), completed=self._step)
        row.add_row(Text(self._stage), bar, f"{self._step}/{self._steps}", self._time_left())
        numbers = Text(f"  {self._numbers}", style="dim", no_wrap=True, overflow="ellipsis")
        return Group(row, numbers, *([self._part._bar()] if self._part else []))

    def _time_left(self) -> str:
        if self.left_s is None:
            return ""
        left = f"{duration(self.left_s)} left"
        if self._steps_after == 0:
            return left
        everything = self.all_left_s
        return f"{left}, {duration(everything)} of all" if everything is not None else left
