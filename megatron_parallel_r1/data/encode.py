"""From text to the token ids that a model reads and writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_parallel_r1.data.prompts import render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# For a released tokenizer that has none: what `encode_prompt` makes of one message, a text and a line end.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] + '\\n' }}{% endfor %}"


def encode_prompt(tokenizer: PreTrainedTokenizerBase, template: str, problem: str) -> list[int]:
    """Token ids that end where the response begins.

    With a chat template: one user message and the opening of the assistant's turn. Without: the bare text and
    a line end.
    """
    text = render(template, problem)
    if tokenizer.chat_template is None:
        return tokenizer.encode(text + "\n", add_special_tokens=False)
    messages = [{"role": "user", "content": text}]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer.encode(chat, add_special_tokens=False)


def encode_response(tokenizer: PreTrainedTokenizerBase, response: str) -> list[int]:
    """Token ids of a whole response, eos included."""
    return [*tokenizer.encode(response, add_special_tokens=False), tokenizer.eos_token_id]


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """The text of tokens, tags shown, eos left out."""
    kept = [token for token in tokens if token != tokenizer.eos_token_id]
    return tokenizer.decode(kept, skip_special_tokens=False) if kept else ""
