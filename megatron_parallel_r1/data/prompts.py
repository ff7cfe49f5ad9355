"""Prompt templates and the encoding of prompts and responses, the same for training and evaluation.

`parallel` asks for what Parallel-R1 (arXiv 2509.07980) asks for, in our own words; `sequential` is its
baseline; `adaptive` asks for blocks only where they help, which the paper calls adaptive; `plain` is the bare
problem, for models that see only one kind of question.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_parallel_r1.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FINAL_LINE = "Close with one last line of the form `Final Answer: …` that holds the answer alone."
_BLOCK = (
    "write <Parallel>, then at least two lines of thought, each inside <Path> and </Path>, then </Parallel>. "
    "The paths are independent: none may refer to another or build on its results. Right after the block "
    "write a concise <Summary> … </Summary> of what the paths found and what to go on with, then continue. "
)

TEMPLATES = {
    "plain": "{problem}",
    "sequential": f"Solve the following problem step by step. {_FINAL_LINE}\n\nProblem: {{problem}}",
    "parallel": (
        "Solve the following problem step by step. Wherever a step gains from being looked at in "
        f"several ways, open a parallel block at that point of your reasoning: {_BLOCK}"
        f"Use as many blocks as help, or none. {_FINAL_LINE}\n\nProblem: {{problem}}"
    ),
    "adaptive": (
        "Solve the following problem. Take the steps that are plain to you one after another. Think in "
        "parallel only where it helps: where you cannot tell which approach will work, where a result is "
        f"worth a second derivation, or where cases can be settled apart. There, {_BLOCK}"
        f"An easy problem needs no block at all. {_FINAL_LINE}\n\nProblem: {{problem}}"
    ),
}


def render(template: str, problem: str) -> str:
    """Returns the user message for a problem.

    Raises:
        UserError: there is no such template.
    """
    if template not in TEMPLATES:
        raise UserError(f"prompt template {template!r}: unknown, use one of {', '.join(TEMPLATES)}")
    return TEMPLATES[template].replace("{problem}", problem)


# For a released tokenizer without a chat template: one message as `encode_prompt` renders it, with a newline.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] + '\\n' }}{% endfor %}"


def encode_prompt(tokenizer: PreTrainedTokenizerBase, template: str, problem: str) -> list[int]:
    """Returns the token ids of the prompt, up to the start of the response.

    With a chat template: one user message and the opening of the assistant's turn. Without: the bare text and
    a newline.
    """
    text = render(template, problem)
    if tokenizer.chat_template is None:
        return tokenizer.encode(text + "\n", add_special_tokens=False)
    messages = [{"role": "user", "content": text}]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer.encode(chat, add_special_tokens=False)


def encode_response(tokenizer: PreTrainedTokenizerBase, response: str) -> list[int]:
    """Returns the token ids of a whole response, including eos."""
    return [*tokenizer.encode(response, add_special_tokens=False), tokenizer.eos_token_id]


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Returns the text of tokens, with tags, without eos."""
    kept = [token for token in tokens if token != tokenizer.eos_token_id]
    text = tokenizer.decode(kept, skip_special_tokens=False) if kept else ""
    assert isinstance(text, str), "one sequence decodes to one text"
    return text
