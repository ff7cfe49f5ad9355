"""Chooses the traces of a report: spread over the steps, right and wrong in turn, within a size limit."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from markupsafe import escape

from megatron_parallel_r1.report.run_folder import RunFiles
from megatron_parallel_r1.utils.jsonl import JsonRecord

STEPS_PER_STAGE = 8
TRACES_PER_STEP = 6
MAX_BYTES = 2_500_000


@dataclass(frozen=True, slots=True)
class ShownTrace:
    """A trace of the report; `verdict` is "right", "wrong" or "unknown"."""

    stage: str
    record: JsonRecord
    verdict: str
    blocks: int


@dataclass(frozen=True, slots=True)
class Showcase:
    """The chosen traces by stage and step, and the number available."""

    shown: tuple[ShownTrace, ...]
    available: int

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(trace.stage for trace in self.shown))


def choose_traces(run: RunFiles) -> Showcase:
    """Up to `STEPS_PER_STAGE` steps of a stage, first and last among them, at most `TRACES_PER_STEP` each."""
    chosen = [_choose(stage.name, stage.traces) for stage in run.stages]
    kept: set[int] = set()
    left = MAX_BYTES
    for trace in (t for turn in zip_longest(*chosen) for t in turn if t is not None):
        size = len(escape(json.dumps(trace.record, ensure_ascii=False)).encode("utf-8", errors="replace"))
        if size <= left:
            left -= size
            kept.add(id(trace))
    shown = [trace for stage in chosen for trace in stage if id(trace) in kept]
    order = list(run.last_steps)
    shown.sort(key=lambda trace: (order.index(trace.stage), trace.record["step"]))
    return Showcase(tuple(shown), sum(len(stage.traces) for stage in run.stages))


def _choose(stage: str, traces: Sequence[JsonRecord]) -> list[ShownTrace]:
    """Traces of one stage, the last step first, so that a tight limit keeps the final ones."""
    by_step: dict[int, list[JsonRecord]] = {}
    for record in traces:
        by_step.setdefault(record["step"], []).append(record)
    steps = sorted(by_step)
    count = min(len(steps), STEPS_PER_STAGE)
    picked = {steps[round(i * (len(steps) - 1) / max(1, count - 1))] for i in range(count)}
    picked |= set(steps[-1:])
    shown: list[ShownTrace] = []
    for step in sorted(picked, reverse=True):
        shown += [_shown(stage, record) for record in _mixed(by_step[step])[:TRACES_PER_STEP]]
    return shown


def _mixed(records: Iterable[JsonRecord]) -> list[JsonRecord]:
    """Right and wrong in turn; with blocks before without."""
    ranked = sorted(records, key=lambda record: _count_blocks(record) == 0)
    right = [record for record in ranked if record.get("correct")]
    wrong = [record for record in ranked if not record.get("correct")]
    return [record for pair in zip_longest(right, wrong) for record in pair if record is not None]


def _shown(stage: str, record: JsonRecord) -> ShownTrace:
    correct = record.get("correct")
    verdict = "unknown" if correct is None else "right" if correct else "wrong"
    return ShownTrace(stage, record, verdict, _count_blocks(record))


def _count_blocks(record: JsonRecord) -> int:
    return sum(part.get("kind") == "block" for part in record["text_parts"])
