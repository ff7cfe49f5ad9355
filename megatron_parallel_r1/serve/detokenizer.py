"""Tokens to text, piece by piece."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"


class Detokenizer:
    """The pieces, put together, are what `data.encode.decode` makes of all tokens at once.

    Decodes from a few tokens back, not from the start: what a token adds may depend on the one before it
    (a blank, half a character), never on more.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._told: list[int] = []
        self._new: list[int] = []

    def add(self, token: int) -> str:
        """The text that is certain now; a character's first bytes wait for its last ones."""
        if token == self._tokenizer.eos_token_id:
            return ""
        self._new.append(token)
        piece = self._piece()
        if not piece or piece.endswith(UNFINISHED):
            return ""
        self._told, self._new = self._new, []
        return piece

    def finish(self) -> str:
        """What still waited."""
        piece = self._piece() if self._new else ""
        self._told, self._new = [], []
        return piece

    def _piece(self) -> str:
        before = self._text(self._told)
        return self._text([*self._told, *self._new])[len(before) :]

    def _text(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False) if tokens else ""
