"""The choice of the traces that a report shows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from markupsafe import escape

from megatron_parallel_r1.report.run_folder import RunFiles, StageFiles
from megatron_parallel_r1.report.trace_tree import is_malformed, text_length
from megatron_parallel_r1.utils.jsonl import JsonRecord

STEPS_PER_STAGE = 8
TRACES_PER_STEP = 6
EXTREMES = 3  # longest traces of a stage, and as many of its malformed ones, whatever their steps
MAX_BYTES = 2_500_000


@dataclass(frozen=True, slots=True)
class ShownTrace:
    """A trace of the report; `verdict` is "right", "wrong" or "unknown", `length` grows with its text."""

    stage: str
    record: JsonRecord
    verdict: str
    malformed: bool
    length: int


@dataclass(frozen=True, slots=True)
class Showcase:
    """The chosen traces by stage and step, and the number available."""

    shown: tuple[ShownTrace, ...]
    available: int

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(trace.stage for trace in self.shown))


def choose_traces(runs: Sequence[RunFiles]) -> Showcase:
    """The traces of each stage, as `_choose` picks them, while `MAX_BYTES` last.

    A stage of several runs is named with its run.
    """
    stages = [
        (f"{run.name} / {stage.name}" if len(runs) > 1 else stage.name, stage)
        for run in runs
        for stage in run.stages
    ]
    chosen = [_choose(name, stage) for name, stage in stages]
    kept: set[int] = set()
    left = MAX_BYTES
    for trace in (t for turn in zip_longest(*chosen) for t in turn if t is not None):
        size = len(escape(json.dumps(trace.record, ensure_ascii=False)).encode("utf-8", errors="replace"))
        if size <= left:
            left -= size
            kept.add(id(trace))
    shown = [
        trace
        for traces in chosen
        for trace in sorted(traces, key=lambda trace: trace.record["step"])
        if id(trace) in kept
    ]
    return Showcase(tuple(shown), sum(len(stage.traces) for _, stage in stages))


def _choose(name: str, stage: StageFiles) -> list[ShownTrace]:
    """Up to `STEPS_PER_STAGE` steps, first and last among them, at most `TRACES_PER_STEP` each, and extremes.

    The last step comes first, so that a tight limit keeps the final traces.
    """
    by_step: dict[int, list[JsonRecord]] = {}
    for record in stage.traces:
        by_step.setdefault(record["step"], []).append(record)
    steps = sorted(by_step)
    count = min(len(steps), STEPS_PER_STAGE)
    picked = {steps[round(i * (len(steps) - 1) / max(1, count - 1))] for i in range(count)}
    picked |= set(steps[-1:])
    records: list[JsonRecord] = []
    for step in sorted(picked, reverse=True):
        records += _mixed(by_step[step])[:TRACES_PER_STEP]
    records += sorted(stage.traces, key=text_length, reverse=True)[:EXTREMES]
    records += [record for record in reversed(stage.traces) if is_malformed(record)][:EXTREMES]
    return [_shown(name, record) for record in {id(record): record for record in records}.values()]


def _mixed(records: Iterable[JsonRecord]) -> list[JsonRecord]:
    """Right and wrong in turn; with blocks before without."""
    ranked = sorted(records, key=lambda r: not any(part["kind"] == "block" for part in r["text_parts"]))
    right = [record for record in ranked if record.get("correct")]
    wrong = [record for record in ranked if not record.get("correct")]
    return [record for pair in zip_longest(right, wrong) for record in pair if record is not None]


def _shown(stage: str, record: JsonRecord) -> ShownTrace:
    correct = record.get("correct")
    verdict = "unknown" if correct is None else "right" if correct else "wrong"
    return ShownTrace(stage, record, verdict, is_malformed(record), text_length(record))
