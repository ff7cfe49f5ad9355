"""Prompt templates and the encoding of prompts and responses, the same for training and evaluation.

`parallel` asks for what Parallel-R1 (arXiv 2509.07980) asks for, in our own words; `sequential` is its
baseline; `adaptive` asks for blocks only where they help, which the paper calls adaptive; `plain` is the bare
problem, for models that see only one kind of question. A recipe may have a text of its own instead.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING

from megatron_parallel_r1.data.cells import BadCell, as_value, at_path
from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.data.tokenizers import BOS, PAD, UNK
from megatron_parallel_r1.data.trace_text import split_forced
from megatron_parallel_r1.errors import UserError, one_line
from megatron_parallel_r1.thought.formats import FORMATS, PARALLEL_R1, ThinkingFormat

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


_FIELD = re.compile(r"(?<!\{)\{([A-Za-z_][\w.]*)\}(?!\})|\{\{([A-Za-z_][\w.]*)\}\}")


def template_text(template: str) -> str:
    """Returns the text of a template: a name of `TEMPLATES`, or itself if it is a text with `{problem}`.

    Raises:
        UserError: it is neither.
    """
    text = TEMPLATES.get(template, template)
    if "problem" not in _fields(text):
        raise UserError(
            f"prompt_template {template!r} is no template: use {', '.join(TEMPLATES)}, "
            "or a text with {problem} in it"
        )
    return text


def template_columns(template: str) -> tuple[str, ...]:
    """Returns the columns of the data that a template shows, `{level}` or `{extra_info.level}`.

    Other braces are text, as in `\\boxed{}`; `{{level}}` stands for `{level}` itself.
    """
    return tuple(name for name in _fields(template_text(template)) if name != "problem")


def _fields(text: str) -> dict[str, None]:
    return dict.fromkeys(match[1] for match in _FIELD.finditer(text) if match[1])


def messages_of(template: str, problem: Problem | str) -> list[dict[str, str]]:
    """Returns the messages of a prompt: those before the question, and the question in its template.

    Args:
        template: a name or a text, as in `template_text`.
        problem: a problem, or its bare question.

    Raises:
        UserError: there is no such template, or the problem lacks a column that it shows.
    """
    if isinstance(problem, str):
        problem = Problem("", problem, ("?",), "")

    def fill(match: re.Match[str]) -> str:
        if match[1] is None:
            return f"{{{match[2]}}}"
        if match[1] == "problem":
            return problem.prompt
        try:
            return at_path(match[1], as_value)(problem.columns)
        except BadCell as error:
            raise UserError(
                f"prompt template: problem {problem.id} of {problem.source}, {error}; "
                f"for the braces themselves write {{{match[0]}}}"
            ) from None

    text = _FIELD.sub(fill, template_text(template))
    before = [{"role": role, "content": content} for role, content in problem.context]
    return [*before, {"role": "user", "content": text}]


def render(template: str, problem: Problem | str) -> str:
    """Returns the text of a prompt without a chat template; arguments and errors as in `messages_of`."""
    return "\n".join(message["content"] for message in messages_of(template, problem))


# For a released tokenizer without a chat template: one message as `encode_prompt` renders it, with a newline.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] + '\\n' }}{% endfor %}"
BOS_CHAT_TEMPLATE = "{{ bos_token }}" + CHAT_TEMPLATE


def chat_template_for(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the chat template of a release whose tokenizer has none."""
    return BOS_CHAT_TEMPLATE if _first_tokens(tokenizer) else CHAT_TEMPLATE


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Returns the token ids of a text without a chat template; BOS first where the tokenizer adds it."""
    tokens = tokenizer.encode(text, add_special_tokens=False)
    first = _first_tokens(tokenizer)
    return tokens if tokens[: len(first)] == first else [*first, *tokens]


@lru_cache(maxsize=8)
def _first_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer.encode("")[:1] == [bos] else []


def encode_prompt(tokenizer: PreTrainedTokenizerBase, template: str, problem: Problem | str) -> list[int]:
    """Returns the token ids of the prompt, up to the start of the response.

    With a chat template: the messages and the opening of the assistant's turn. Without: their text and a
    newline, after BOS where the tokenizer adds it. Arguments and errors as in `messages_of`.

    Raises:
        UserError: the chat template fails on the problem, too.
    """
    messages = messages_of(template, problem)
    if tokenizer.chat_template is None:
        return encode_text(tokenizer, "".join(message["content"] + "\n" for message in messages))
    try:
        chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # whatever a template raises
        raise UserError(
            f"the tokenizer's chat template fails on a problem ({one_line(error)}); correct the template, or "
            f"drop the row: {messages[-1]['content'][:60]!r}"
        ) from None
    return tokenizer.encode(chat, add_special_tokens=False)


def encode_response(
    tokenizer: PreTrainedTokenizerBase, response: str, format: ThinkingFormat = PARALLEL_R1
) -> list[int]:
    """Returns the token ids of a whole response, including eos.

    Text that an engine forces is encoded by itself, as an engine writes it.
    """
    forces_text = any(format.plain_pieces())
    pieces = split_forced(response, format) if forces_text else [response]
    encoded = (tokenizer.encode(piece, add_special_tokens=False) for piece in pieces)
    return [*chain.from_iterable(encoded), tokenizer.eos_token_id]


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Returns the text of tokens, with tags, without those that `is_control` names."""
    kept = [token for token in tokens if not is_control(tokenizer, token)]
    text = tokenizer.decode(kept, skip_special_tokens=False) if kept else ""
    assert isinstance(text, str), "one sequence decodes to one text"
    return text


def is_control(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    """Whether a token is no text: EOS, and special tokens such as those of a chat's turns.

    Tags and unknown words are text, and so are the special tokens of our own tokenizers.
    """
    return token in _control_tokens(tokenizer)


@lru_cache(maxsize=8)
def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int | None]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    tags = (tag for format in FORMATS.values() for tag in format.tags)
    shown = (*tags, PAD, BOS, UNK)
    special = (token for token, entry in added.items() if entry.special and str(entry) not in shown)
    unknown = tokenizer.unk_token_id if added else None
    return frozenset({tokenizer.eos_token_id, *(token for token in special if token != unknown)})
