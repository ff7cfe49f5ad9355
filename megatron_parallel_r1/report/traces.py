"""The records of `traces.jsonl`, with paths side by side.

The viewer of `report.html` reads the parts under "text_parts".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_parallel_r1.data.embedded.traces import stated_result
from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.data.prompts import decode
from megatron_parallel_r1.rewards.base import Judged
from megatron_parallel_r1.rewards.verification import extract_answer
from megatron_parallel_r1.rewards.verifier import equivalent
from megatron_parallel_r1.thought.trace import Trace
from megatron_parallel_r1.thought.tree import Block, Path, Tree

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


def stated_answer(text: str) -> str | None:
    """The answer that a path states, if only as a result on the way; None without one."""
    return extract_answer(text) or stated_result(text)


def trace_record(
    trace: Trace,
    problem: Problem,
    judged: Judged,
    reward: float | None,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """A record of `traces.jsonl`, without stage and step."""

    def judge_path(text: str) -> tuple[str | None, bool | None]:
        stated = stated_answer(text)
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
