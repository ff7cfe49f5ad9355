"""From what a client sends to the token ids that the model reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_parallel_r1.serve.api_error import Refused
from megatron_parallel_r1.serve.schema import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def chat_prompt(tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[Message]) -> list[int]:
    """The conversation, its last message put as the training put a problem (`data.encode.encode_prompt`).

    Raises:
        Refused: 400; it does not end in a user's message, or the model has no chat template for more.
    """
    *before, last = messages
    if last.role != "user":
        raise Refused(400, "the last message must be the user's", "messages")
    if not last.text.strip():
        raise Refused(400, "the last message is empty", "messages")
    problem = template.replace("{problem}", last.text)
    if tokenizer.chat_template is None:
        if before:
            raise Refused(
                400, "this model has no chat template: send one user message and nothing else", "messages"
            )
        return tokenizer.encode(problem + "\n", add_special_tokens=False)
    from jinja2 import TemplateError

    turns = [{"role": message.role, "content": message.text} for message in before]
    turns.append({"role": "user", "content": problem})
    try:
        chat = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    except (TemplateError, ValueError, TypeError) as error:
        raise Refused(
            400, f"the model's chat template refuses the conversation: {error}", "messages"
        ) from None
    return tokenizer.encode(chat, add_special_tokens=False)


def text_prompts(
    tokenizer: PreTrainedTokenizerBase, vocabulary: int, prompt: str | list[int] | list[str]
) -> list[list[int]]:
    """The prompts of a text completion, as they are: no template is put around them.

    Raises:
        Refused: 400; there is none, one is empty, or a token id is unknown.
    """
    if isinstance(prompt, str):
        prompts = [tokenizer.encode(prompt, add_special_tokens=False)]
    elif any(isinstance(item, int) for item in prompt):
        prompts = [[item for item in prompt if isinstance(item, int)]]
    else:
        prompts = [tokenizer.encode(item, add_special_tokens=False) for item in prompt]  # type: ignore[arg-type]
    if not prompts or not all(prompts):
        raise Refused(400, "the prompt is empty", "prompt")
    if any(not 0 <= token < vocabulary for tokens in prompts for token in tokens):
        raise Refused(400, f"a token id is outside 0..{vocabulary - 1}", "prompt")
    return prompts
