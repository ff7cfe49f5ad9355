"""Log-probs of a choice in OpenAI's two shapes, that of chats and that of text completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron_parallel_r1.rollout.engine import TokenScore
from megatron_parallel_r1.serve.text import INCOMPLETE, Detokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Scored = Sequence[tuple[int, TokenScore | None]]


class LogprobWriter:
    """Writes the tokens of one choice piece by piece, in the order of its flat text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer)
        self._offset = 0

    def chat(self, scored: Scored) -> dict[str, Any]:
        """`logprobs` of a chat's choice; the text of part of a character has no bytes."""
        content = []
        for token, score in scored:
            assert score is not None, "a chat echoes no prompt"
            top = [self._entry(*alternative) for alternative in score.alternatives]
            content.append(self._entry(token, score.logprob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def text(self, scored: Scored) -> dict[str, Any]:
        """`logprobs` of a text's choice; null for the first token of an echoed prompt: nothing is before it.

        `top_logprobs` has each token itself beside its alternatives, as OpenAI's has. Of tokens with one text
        only the most likely is in it.
        """
        tops: list[dict[str, float] | None] = []
        offsets = []
        for token, score in scored:
            offsets.append(self._offset)
            self._offset += len(self._detokenizer.add(token))
            top: dict[str, float] = {}
            for other, logprob in score.alternatives if score else ():
                top.setdefault(self._text(other), logprob)
            if score:
                top.setdefault(self._text(token), score.logprob)
            tops.append(top if score else None)
        return {
            "tokens": [self._text(token) for token, _ in scored],
            "token_logprobs": [score and score.logprob for _, score in scored],
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        return {
            "token": text,
            "logprob": logprob,
            "bytes": None if INCOMPLETE in text else list(text.encode()),
        }

    def _text(self, token: int) -> str:
        text = self._tokenizer.decode([token], skip_special_tokens=False)
        assert isinstance(text, str), "one sequence decodes to one text"
        return text
