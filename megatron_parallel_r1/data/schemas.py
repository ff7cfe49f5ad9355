"""The published data sets that we know, and how a row of each becomes a problem.

A new data set is one more `Schema`. A reader takes what a row holds as it is published and raises
`BadCell` where a column is not what the schema says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_parallel_r1.data.canonical import canonical
from megatron_parallel_r1.data.form import malformed
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.latex import last_box

Row = Mapping[str, Any]


class BadCell(ValueError):
    """A column of a row that cannot be used, and why."""

    def __init__(self, column: str, what: str) -> None:
        super().__init__(f"column {column!r}: {what}")
        self.column = column
        self.what = what


@dataclass(frozen=True, slots=True)
class Schema:
    """Where a data set lives on the Hugging Face Hub, and how to read its rows.

    Attributes:
        name: on the Hub, `owner/name`.
        config: the Hub's configuration, None for the only one.
        split: read unless the caller names another.
        prompt, answer: read these from a row; raise `BadCell`.
        response: reads the worked response, in data sets that have one.
        repeats: rows may repeat a problem; repeats are dropped, and so is every copy of a problem whose
            copies disagree on the answer.
    """

    name: str
    config: str | None
    split: str
    prompt: Callable[[Row], str]
    answer: Callable[[Row], str]
    response: Callable[[Row], str] | None = None
    repeats: bool = False


def schema_of(name: str) -> Schema:
    """The schema of a data set by its name on the Hub.

    Raises:
        UserError: it is none of those that we know.
    """
    if name not in _SCHEMAS:
        raise UserError(f"data set {name!r}: unknown, use one of {', '.join(sorted(_SCHEMAS))}")
    return _SCHEMAS[name]


def _text(column: str, other: str | None = None) -> Callable[[Row], str]:
    """Reads a column of text, which copies of the data set may call `other`."""

    def read(row: Row) -> str:
        name = other if other in row and column not in row else column
        return _as_text(row.get(name), name)

    return read


def _as_text(value: object, column: str) -> str:
    if value is None:
        raise BadCell(column, "missing")
    if not isinstance(value, str):
        raise BadCell(column, f"{type(value).__name__} instead of text")
    if not value.strip():
        raise BadCell(column, "blank")
    return value.strip()


def _value(column: str) -> Callable[[Row], str]:
    """Reads an answer kept as text or as a number."""

    def read(row: Row) -> str:
        value = row.get(column)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
        return _as_text(value, column)

    return read


def _gsm8k_answer(row: Row) -> str:
    """What follows `####` at the end of the worked answer, without thousands' commas."""
    worked = _as_text(row.get("answer"), "answer")
    _, mark, answer = worked.rpartition("####")
    if not mark or not answer.strip():
        raise BadCell("answer", "no value behind ####")
    return answer.strip().replace(",", "")


def _boxed_solution(row: Row) -> str:
    answer = last_box(_as_text(row.get("solution"), "solution"))
    if answer is None:
        raise BadCell("solution", r"no \boxed value")
    return answer


_DAPO_WRAPPER = re.compile(
    r"Solve the following math problem step by step\. The last line of your response should be of the "
    r"form Answer: \$Answer \(without quotes\) where \$Answer is the answer to the problem\.\s*"
    r"(?P<problem>.*?)"
    r"\s*Remember to put your answer on its own line after \"Answer:\"\.?",
    re.DOTALL,
)


def _dapo_prompt(row: Row) -> str:
    """The one user message, without the instruction that the published set wraps around each problem."""
    messages = row.get("prompt")
    if not isinstance(messages, list) or len(messages) != 1 or not isinstance(messages[0], dict):
        raise BadCell("prompt", "not a list of one message")
    text = _as_text(messages[0].get("content"), "prompt")
    wrapped = _DAPO_WRAPPER.fullmatch(text)
    return _as_text(wrapped["problem"], "prompt") if wrapped else text


def _dapo_answer(row: Row) -> str:
    graded = row.get("reward_model")
    if not isinstance(graded, dict):
        raise BadCell("reward_model", "missing")
    return _value("ground_truth")(graded)


def _parallel_response(row: Row) -> str:
    response = canonical(_as_text(row.get("response"), "response"))
    if what := malformed(response):
        raise BadCell("response", what)
    return response


_SCHEMAS = {
    schema.name: schema
    for schema in (
        Schema("openai/gsm8k", "main", "train", _text("question"), _gsm8k_answer),
        Schema(
            "Parallel-R1/Parallel-GSM8K",
            None,
            "train",
            _text("question"),
            _value("answer"),
            response=_parallel_response,
        ),
        Schema("BytedTsinghua-SIA/DAPO-Math-17k", None, "train", _dapo_prompt, _dapo_answer, repeats=True),
        Schema("DigitalLearningGmbH/MATH-lighteval", None, "train", _text("problem"), _boxed_solution),
        Schema("HuggingFaceH4/MATH-500", None, "test", _text("problem"), _value("answer")),
        Schema("HuggingFaceH4/aime_2024", None, "train", _text("problem"), _value("answer")),
        Schema("math-ai/aime25", None, "test", _text("problem"), _value("answer")),
        Schema("math-ai/amc23", None, "test", _text("question", "problem"), _value("answer")),
    )
}
