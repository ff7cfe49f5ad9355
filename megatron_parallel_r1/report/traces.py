"""The records of `traces.jsonl`, with paths side by side, and the choice of those that a report shows.

The viewer of `report.html` reads the parts under "text_parts".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from markupsafe import escape

from megatron_parallel_r1.data.embedded.traces import stated_result
from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.data.prompts import decode
from megatron_parallel_r1.report.run_folder import RunFiles
from megatron_parallel_r1.rewards.base import Judged
from megatron_parallel_r1.rewards.verification import extract_answer
from megatron_parallel_r1.rewards.verifier import equivalent
from megatron_parallel_r1.thought.trace import Trace
from megatron_parallel_r1.thought.tree import Block, Path, Tree
from megatron_parallel_r1.utils.jsonl import JsonRecord

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PathJudge = Callable[[str], tuple[str | None, bool | None]]


def trace_parts(
    tokens: Sequence[int],
    tree: Tree,
    tokenizer: PreTrainedTokenizerBase,
    judge: PathJudge,
    sampled: Sequence[bool] | None = None,
) -> list[dict[str, Any]]:
    """The parts of a trace.

    Args:
        tokens: the flat response; eos tokens are skipped.
        tree: its parse.
        tokenizer: decodes the text between the tags.
        judge: a path's text -> its stated result, and whether that is right; None: unknown.
        sampled: which tokens the policy sampled; marks the paths that the engine closed.

    Returns:
        `{"kind": "text", "text"}` or `{"kind": "block", "paths", "summary", "summary_closed",
        "well_formed", "stray"}`; a path is `{"text", "closed", "forced", "answer", "correct"}`, and a
        path with blocks of its own also has its "parts". `stray` is text of a malformed block
        outside its paths; in a format with plans a block also has its "plan". A block that the engine
        closed somewhere is not well formed.
    """
    return list(_PartsBuilder(tokens, tokenizer, judge, sampled).parts(0, tree.length, tree.blocks))


@dataclass(frozen=True, slots=True)
class _PartsBuilder:
    tokens: Sequence[int]
    tokenizer: PreTrainedTokenizerBase
    judge: PathJudge
    sampled: Sequence[bool] | None

    def parts(self, start: int, stop: int, blocks: Sequence[Block]) -> Iterator[dict[str, Any]]:
        for block in blocks:
            yield from self._text_part(start, block.start)
            yield self._block(block)
            start = block.stop(len(self.tokens))
        yield from self._text_part(start, stop)

    def _text_part(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        text = self._text(start, stop)
        if text.strip():
            yield {"kind": "text", "text": text}

    def _block(self, block: Block) -> dict[str, Any]:
        segments = block.segments(len(self.tokens))
        before = (block.start + 1, block.paths[0].start)
        gaps = [before] if block.planned is None else []
        gaps += [(path.stop, stop) for path, (_, stop) in zip(block.paths, segments, strict=True)]
        stray = " ".join(self._text(start, stop).strip() for start, stop in gaps).strip()
        summary = block.summary
        own = self.sampled is None or all(self.sampled[end - 1] for end in block.own_ends)
        plan = {} if block.planned is None else {"plan": self._text(*before)}
        return {
            "kind": "block",
            **plan,
            "paths": [self._path(path) for path in block.paths],
            "summary": summary and self._text(*summary.inside),
            "summary_closed": bool(summary and summary.closed) or not block.summarised,
            "well_formed": block.well_formed and own,
            "stray": stray or None,
        }

    def _path(self, path: Path) -> dict[str, Any]:
        start, stop = path.inside
        text = self._text(start, stop)
        answer, correct = self.judge(text)
        forced = path.closed and self.sampled is not None and not self.sampled[path.stop - 1]
        parts = {"parts": list(self.parts(start, stop, path.blocks))} if path.blocks else {}
        return {
            "text": text,
            "closed": path.closed,
            "forced": forced,
            "answer": answer,
            "correct": correct,
            **parts,
        }

    def _text(self, start: int, stop: int) -> str:
        return decode(self.tokenizer, [int(token) for token in self.tokens[start:stop]])


def trace_record(
    trace: Trace,
    problem: Problem,
    judged: Judged,
    reward: float | None,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """A record of `traces.jsonl`, without stage and step."""

    def judge_path(text: str) -> tuple[str | None, bool | None]:
        stated = extract_answer(text) or stated_result(text)
        if stated is None:
            return None, None
        return stated, any(equivalent(stated, answer) for answer in problem.answers)

    return {
        "problem": problem.prompt,
        "answer": " or ".join(problem.answers),
        "extracted": judged.extracted,
        "correct": judged.correct,
        "reward": reward,
        "finish": trace.finish,
        "text_parts": trace_parts(trace.tokens, trace.tree, tokenizer, judge_path, trace.sampled),
    }


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
