"""A trace in reading order: text, and blocks whose paths stand side by side.

The parts are what `traces.jsonl` holds under "text_parts" and what the viewer of `report.html` shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_parallel_r1.thought.tree import Block, Path, Tree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Judge = Callable[[str], tuple[str | None, bool | None]]


def trace_parts(
    tokens: Sequence[int],
    tree: Tree,
    tokenizer: PreTrainedTokenizerBase,
    judge: Judge,
    sampled: Sequence[bool] | None = None,
) -> list[dict[str, Any]]:
    """Spells a trace out.

    Args:
        tokens: the flat response; eos tokens are left out.
        tree: its parse.
        tokenizer: decodes the text between the tags.
        judge: a path's text -> the result that it states, and whether that is right; None: unknown.
        sampled: which tokens the policy drew; marks the paths that the engine closed.

    Returns:
        `{"kind": "text", "text"}` or `{"kind": "block", "paths", "summary", "summary_closed",
        "well_formed", "stray"}`; a path is `{"text", "closed", "forced", "answer", "correct"}`, and a
        path with blocks of its own also has its "parts". `stray` is text that a malformed block holds
        outside its paths. A block that the engine had to close somewhere is not well formed.
    """
    return list(_Speller(tokens, tokenizer, judge, sampled).parts(0, tree.length, tree.blocks))


@dataclass(frozen=True, slots=True)
class _Speller:
    tokens: Sequence[int]
    tokenizer: PreTrainedTokenizerBase
    judge: Judge
    sampled: Sequence[bool] | None

    def parts(self, start: int, stop: int, blocks: Sequence[Block]) -> Iterator[dict[str, Any]]:
        for block in blocks:
            yield from self._text_part(start, block.start)
            yield self._block(block)
            start = _stop(block, len(self.tokens))
        yield from self._text_part(start, stop)

    def _text_part(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        text = self._text(start, stop)
        if text.strip():
            yield {"kind": "text", "text": text}

    def _block(self, block: Block) -> dict[str, Any]:
        segments = block.segments(len(self.tokens))
        gaps = [(block.start + 1, block.paths[0].start)]
        gaps += [(path.stop, stop) for path, (_, stop) in zip(block.paths, segments, strict=True)]
        stray = " ".join(self._text(start, stop).strip() for start, stop in gaps).strip()
        summary = block.summary
        ends = [*(path.stop for path in block.paths), *([summary.stop] if summary else [])]
        own = self.sampled is None or all(self.sampled[end - 1] for end in ends)
        return {
            "kind": "block",
            "paths": [self._path(path) for path in block.paths],
            "summary": summary and self._text(summary.start + 1, summary.stop - summary.closed),
            "summary_closed": bool(summary and summary.closed),
            "well_formed": block.well_formed and own,
            "stray": stray or None,
        }

    def _path(self, path: Path) -> dict[str, Any]:
        start, stop = path.start + 1, path.stop - path.closed
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
        kept = [int(t) for t in self.tokens[start:stop] if t != self.tokenizer.eos_token_id]
        return self.tokenizer.decode(kept, skip_special_tokens=False) if kept else ""


def _stop(block: Block, length: int) -> int:
    """Where the text after a block begins."""
    if block.summary is not None:
        return block.summary.stop
    return length if block.end is None else block.end + 1
