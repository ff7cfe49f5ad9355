"""Streams text: decodes tokens piece by piece, and cuts the text at stop sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_parallel_r1.data.prompts import decode, is_control

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\ufffd"


class Detokenizer:
    """Decodes token by token; the pieces joined equal `data.prompts.decode` of all tokens at once.

    Decodes from the last emitted tokens, not from the start: the text of a token may depend on the one before
    it (a leading space, half a character), never on earlier ones.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._emitted: list[int] = []
        self._pending: list[int] = []

    def add(self, token: int) -> str:
        """The text that is complete now; the first bytes of a character wait for its last ones."""
        if is_control(self._tokenizer, token):
            return ""
        self._pending.append(token)
        piece = self._piece()
        if not piece or piece.endswith(INCOMPLETE):
            return ""
        self._emitted, self._pending = self._pending, []
        return piece

    def finish(self) -> str:
        """The text of the pending tokens."""
        piece = self._piece() if self._pending else ""
        self._emitted, self._pending = [], []
        return piece

    def _piece(self) -> str:
        before = self._text(self._emitted)
        return self._text([*self._emitted, *self._pending])[len(before) :]

    def _text(self, tokens: list[int]) -> str:
        return decode(self._tokenizer, tokens)


class StopCutter:
    """Ends a streamed text before its first stop sequence; `hit` says that one was found.

    Holds back the end of the text while it may still become a stop sequence.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.hit = False
        self._stops = stops
        self._held = ""

    def add(self, piece: str) -> str:
        """The text in which no stop sequence can begin any more."""
        if self.hit:
            return ""
        text = self._held + piece
        starts = [start for stop in self._stops if (start := text.find(stop)) >= 0]
        if starts:
            self.hit, self._held = True, ""
            return text[: min(starts)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """The text that was held back, when no further piece can complete a stop sequence."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a prefix of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
