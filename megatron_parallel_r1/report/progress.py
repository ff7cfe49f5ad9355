"""Live progress of a stage: a bar on a terminal, a line every few seconds in a log."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_parallel_r1.utils.formats import duration, number, percent

METRICS: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("loss", "loss", number),
    ("reward", "reward", number),
    ("accuracy", "accuracy", percent),
    ("parallel_ratio", "parallel", percent),
)
REDRAW_S = 0.1
RECENT_STEPS = 20


class StageProgress:
    """Shows a stage's step, metrics and time left; a context manager around the steps.

    Args:
        stage: its name.
        steps: its last step.
        done: steps that a resumed stage has already done.
        console: a terminal gets a bar, anything else lines.
        every_s: seconds between two lines of a log.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        stage: str,
        steps: int,
        *,
        done: int = 0,
        console: Console | None = None,
        every_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stage, self._steps, self._step = stage, steps, done
        self._console = console or Console()
        self._clock = clock
        self._numbers = ""
        self._recent = deque([(done, clock())], maxlen=RECENT_STEPS)
        self._drawn_at = float("-inf")
        bar = self._console.is_terminal and not self._console.is_dumb_terminal
        self._live = Live(console=self._console, auto_refresh=False) if bar else None
        self._pause_s = REDRAW_S if bar else every_s

    @property
    def left_s(self) -> float | None:
        """Seconds to the end of the stage at the pace of the recent steps; None before the first."""
        (first, began), (last, now) = self._recent[0], self._recent[-1]
        if last == first:
            return None
        return (now - began) / (last - first) * (self._steps - last)

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

    def __enter__(self) -> StageProgress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._live.update(self._bar(), refresh=True)
            self._live.stop()

    def _draw(self) -> None:
        if self._live:
            self._live.update(self._bar(), refresh=True)
            return
        line = f"{self._stage}  step {self._step}/{self._steps}  {self._numbers}  {self._time_left()}"
        self._console.print(line.rstrip(), markup=False, highlight=False, soft_wrap=True)

    def _bar(self) -> RenderableType:
        row = Table.grid(padding=(0, 2), expand=True)
        row.add_column(no_wrap=True, style="bold")
        row.add_column(ratio=1)
        row.add_column(no_wrap=True, justify="right")
        row.add_column(no_wrap=True, style="cyan")
        bar = ProgressBar(total=max(1, self._steps), completed=self._step)
        row.add_row(Text(self._stage), bar, f"{self._step}/{self._steps}", self._time_left())
        return Group(row, Text(f"  {self._numbers}", style="dim"))

    def _time_left(self) -> str:
        if self.left_s is None:
            return ""
        return f"{duration(self.left_s)} left"
