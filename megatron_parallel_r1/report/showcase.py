"""Chooses the traces that a report shows: spread over the steps, right and wrong alike, within a budget."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from markupsafe import escape

from megatron_parallel_r1.report.run_folder import Run

Record = dict[str, Any]
STEPS_A_STAGE = 8
TRACES_A_STEP = 6
MOST_BYTES = 2_500_000


@dataclass(frozen=True, slots=True)
class Shown:
    """A trace of the viewer; `verdict` is "right", "wrong" or "unknown"."""

    stage: str
    record: Record
    verdict: str
    blocks: int


@dataclass(frozen=True, slots=True)
class Showcase:
    """The chosen traces by stage and step, and how many the run sampled."""

    shown: tuple[Shown, ...]
    available: int

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(trace.stage for trace in self.shown))


def choose_traces(run: Run) -> Showcase:
    """Up to `STEPS_A_STAGE` steps of a stage, first and last among them, at most `TRACES_A_STEP` each."""
    chosen = [_choose(stage.name, stage.traces) for stage in run.stages]
    kept: set[int] = set()
    left = MOST_BYTES
    for trace in (t for turn in zip_longest(*chosen) for t in turn if t is not None):
        size = len(escape(json.dumps(trace.record, ensure_ascii=False)).encode("utf-8", errors="replace"))
        if size <= left:
            left -= size
            kept.add(id(trace))
    shown = [trace for stage in chosen for trace in stage if id(trace) in kept]
    order = list(run.last_steps)
    shown.sort(key=lambda trace: (order.index(trace.stage), trace.record["step"]))
    return Showcase(tuple(shown), sum(len(stage.traces) for stage in run.stages))


def _choose(stage: str, traces: Sequence[Record]) -> list[Shown]:
    """Of one stage, the last step first, since a tight budget should keep what the run came to."""
    by_step: dict[int, list[Record]] = {}
    for record in traces:
        by_step.setdefault(record["step"], []).append(record)
    steps = sorted(by_step)
    count = min(len(steps), STEPS_A_STAGE)
    picked = {steps[round(i * (len(steps) - 1) / max(1, count - 1))] for i in range(count)}
    picked |= set(steps[-1:])
    found: list[Shown] = []
    for step in sorted(picked, reverse=True):
        found += [_shown(stage, record) for record in _mixed(by_step[step])[:TRACES_A_STEP]]
    return found


def _mixed(records: Iterable[Record]) -> list[Record]:
    """Right and wrong in turn; with blocks before without."""
    ranked = sorted(records, key=lambda record: _count_blocks(record) == 0)
    right = [record for record in ranked if record.get("correct")]
    wrong = [record for record in ranked if not record.get("correct")]
    return [record for pair in zip_longest(right, wrong) for record in pair if record is not None]


def _shown(stage: str, record: Record) -> Shown:
    verdict = {True: "right", False: "wrong"}.get(record.get("correct"), "unknown")
    return Shown(stage, record, verdict, _count_blocks(record))


def _count_blocks(record: Record) -> int:
    return sum(part.get("kind") == "block" for part in record["text_parts"])
