"""Schemas of known published data sets: how a row becomes a problem.

To add a data set, add a `Schema`. Its readers take a row as published and raise `BadCell` where a column does
not match the schema.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from megatron_parallel_r1.data.cells import (
    BadCell,
    CellReader,
    Cells,
    after_mark,
    as_answers,
    as_context,
    as_question,
    as_response,
    as_text,
    as_value,
    at_path,
    boxed_answer,
    text,
    value,
)
from megatron_parallel_r1.data.problems import ChatTurn
from megatron_parallel_r1.data.trace_text import canonical, describe_fault
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.thought.formats import ThinkingFormat
from megatron_parallel_r1.utils.settings import Settings

CUSTOM = "custom"


@dataclass(frozen=True, slots=True)
class Schema:
    """The location of a data set on the Hugging Face Hub, and the readers of its rows.

    Attributes:
        name: the name on the Hub, `owner/name`.
        config: the configuration on the Hub, None for the only one.
        split: the default split.
        prompt: reader of the question; raises `BadCell`, as all readers do.
        answers: reader of the right answers.
        response: reader of the worked response in a thinking format, in data sets that have one.
        context: reader of the messages before the question.
        source: reader of the row's own source; None: all rows are of `name`.
        repeats: rows may repeat a problem; drops repeats, and every copy of a problem whose copies disagree
            on the answer.
        secret: columns with the right answer, which no prompt may show.
    """

    name: str
    config: str | None
    split: str
    prompt: CellReader
    answers: Callable[[Cells], tuple[str, ...]]
    response: Callable[[Cells, ThinkingFormat], str] | None = None
    context: Callable[[Cells], tuple[ChatTurn, ...]] = lambda row: ()
    source: CellReader | None = None
    repeats: bool = False
    secret: tuple[str, ...] = ("answer", "solution", "response", "reward_model")


class Columns(Settings):
    """Columns of a data set of your own.

    A name may lead into a column: `reward_model.ground_truth`, `prompt.0.content`. In a list of messages, a
    role selects the last message of that role: `prompt.user`.
    """

    prompt: str
    """Column of the problem: a text, or a list of messages. The user's last message is the problem; messages
    before it, such as a system prompt, are kept."""
    answer: str
    """Column of the right answer: a text, a number, or a list of them, of which any counts. Of a worked
    answer the final one is read: the last box, or a last line `#### 1,234`."""
    response: str | None = None
    """Column of the worked response: a trace with tags, or without any; of a list of messages, the
    assistant's last reply to the user's last message. White space between tags that no engine produces is
    removed."""
    source: str | None = None
    """Column of the row's own source, by which metrics are split; null: all rows have the data set's name."""


def schema_of(name: str, columns: Columns | None = None) -> Schema:
    """Returns the schema of a data set, by its name on the Hub or from `columns`.

    Raises:
        UserError: the name is unknown and there are no columns.
    """
    if columns is not None:
        response, source = columns.response, columns.source
        return Schema(
            name,
            config=None,
            split="train",
            prompt=at_path(columns.prompt, as_question),
            answers=at_path(columns.answer, as_answers),
            response=None if response is None else _trace(at_path(response, as_response), response),
            context=at_path(columns.prompt, as_context),
            source=None if source is None else at_path(source, as_value),
            secret=tuple(path.partition(".")[0] for path in (columns.answer, response or columns.answer)),
        )
    if name == CUSTOM:
        raise UserError("data set custom: name the columns of prompt and answer with columns")
    if name not in _SCHEMAS:
        raise UserError(
            f"data set {name!r}: unknown, use one of {', '.join(sorted(_SCHEMAS))}, "
            "or name the columns of prompt and answer with columns"
        )
    return _SCHEMAS[name]


def _gsm8k_answer(row: Cells) -> str:
    answer = after_mark(as_text(row.get("answer"), "answer"), "answer")
    if answer is None:
        raise BadCell("answer", "no value after ####")
    return answer


def _boxed_solution(row: Cells) -> str:
    answer = boxed_answer(as_text(row.get("solution"), "solution"), "solution")
    if answer is None:
        raise BadCell("solution", r"no \boxed value")
    return answer


_DAPO_PREFIX = re.compile(
    r"Solve the following math problem step by step\. The last line of your response should be of the "
    r"form Answer: \$Answer \(without quotes\) where \$Answer is the answer to the problem\.\s*"
)
_DAPO_SUFFIX = re.compile(r"\s*Remember to put your answer on its own line after \"Answer:\"\.?\Z")


def _dapo_prompt(row: Cells) -> str:
    """Returns the user message without the instruction that the published set wraps around each problem."""
    if not isinstance(row.get("prompt"), list):
        raise BadCell("prompt", "not a list of messages")
    message = as_question(row["prompt"], "prompt")
    if prefix := _DAPO_PREFIX.match(message):
        message = message[prefix.end() :]
    if suffix := _DAPO_SUFFIX.search(message):
        message = message[: suffix.start()]
    return as_text(message, "prompt")


def _dapo_answer(row: Cells) -> str:
    reward_model = row.get("reward_model")
    if not isinstance(reward_model, dict):
        raise BadCell("reward_model", "missing")
    return value("ground_truth")(reward_model)


def _only(read: CellReader) -> Callable[[Cells], tuple[str, ...]]:
    """Reads a single right answer."""
    return lambda row: (read(row),)


def _trace(read: CellReader, column: str) -> Callable[[Cells, ThinkingFormat], str]:
    """Reads a response into canonical text; raises `BadCell` where the parser does not accept it."""

    def checked(row: Cells, format: ThinkingFormat) -> str:
        response = canonical(read(row), format)
        if fault := describe_fault(response, format):
            what, mark, where = fault.partition(", after ")
            raise BadCell(column, what, mark + where)
        return response

    return checked


_SCHEMAS = {
    schema.name: schema
    for schema in (
        Schema("openai/gsm8k", "main", "train", text("question"), _only(_gsm8k_answer)),
        Schema(
            "Parallel-R1/Parallel-GSM8K",
            None,
            "train",
            text("question"),
            _only(value("answer")),
            response=_trace(text("response"), "response"),
        ),
        Schema(
            "BytedTsinghua-SIA/DAPO-Math-17k",
            None,
            "train",
            _dapo_prompt,
            _only(_dapo_answer),
            context=at_path("prompt", as_context),
            repeats=True,
        ),
        Schema("DigitalLearningGmbH/MATH-lighteval", None, "train", text("problem"), _only(_boxed_solution)),
        Schema("HuggingFaceH4/MATH-500", None, "test", text("problem"), _only(value("answer"))),
        Schema("HuggingFaceH4/aime_2024", None, "train", text("problem"), _only(value("answer"))),
        Schema("math-ai/aime25", None, "test", text("problem"), _only(value("answer"))),
        Schema("math-ai/amc23", None, "test", text("question", "problem"), _only(value("answer"))),
    )
}
