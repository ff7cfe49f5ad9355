"""The published data sets that we know, and how a row of each becomes a problem.

A new data set is one more `Schema`. A reader takes what a row holds as it is published and raises
`BadCell` where a column is not what the schema says.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_parallel_r1.data.cells import BadCell, CellReader, as_text, as_value, at_path, text, value
from megatron_parallel_r1.data.shard import Cells
from megatron_parallel_r1.data.trace_text import canonical, malformed
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.utils.latex import last_box
from megatron_parallel_r1.utils.settings import Settings

CUSTOM = "custom"


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
    prompt: CellReader
    answer: CellReader
    response: CellReader | None = None
    repeats: bool = False


class Columns(Settings):
    """Columns of a data set of your own.

    A name may lead into a column: `reward_model.ground_truth`, `prompt.0.content`.
    """

    prompt: str
    """Column of the problem."""
    answer: str
    """Column of the right answer."""
    response: str | None = None
    """Column of the worked response: a trace with tags, or without any. White space between tags that no
    engine produces is removed."""


def schema_of(name: str, columns: Columns | None = None) -> Schema:
    """The schema of a data set by its name on the Hub, or as `columns` say, if given.

    Raises:
        UserError: it is none of those that we know, and no columns are given.
    """
    if columns is not None:
        response = columns.response
        return Schema(
            name,
            config=None,
            split="train",
            prompt=at_path(columns.prompt, as_text),
            answer=at_path(columns.answer, as_value),
            response=None if response is None else _trace(at_path(response, as_text), response),
        )
    if name == CUSTOM:
        raise UserError("data set custom: say with columns which hold prompt and answer")
    if name not in _SCHEMAS:
        raise UserError(
            f"data set {name!r}: unknown, use one of {', '.join(sorted(_SCHEMAS))}, "
            "or say with columns which hold prompt and answer"
        )
    return _SCHEMAS[name]


def _gsm8k_answer(row: Cells) -> str:
    """What follows `####` at the end of the worked answer, without thousands' commas."""
    worked = as_text(row.get("answer"), "answer")
    _, mark, answer = worked.rpartition("####")
    if not mark or not answer.strip():
        raise BadCell("answer", "no value behind ####")
    return answer.strip().replace(",", "")


def _boxed_solution(row: Cells) -> str:
    answer = last_box(as_text(row.get("solution"), "solution"))
    if answer is None:
        raise BadCell("solution", r"no \boxed value")
    return answer


_DAPO_BEFORE = re.compile(
    r"Solve the following math problem step by step\. The last line of your response should be of the "
    r"form Answer: \$Answer \(without quotes\) where \$Answer is the answer to the problem\.\s*"
)
_DAPO_BEHIND = re.compile(r"\s*Remember to put your answer on its own line after \"Answer:\"\.?\Z")


def _dapo_prompt(row: Cells) -> str:
    """The one user message, without the instruction that the published set wraps around each problem."""
    messages = row.get("prompt")
    if not isinstance(messages, list) or len(messages) != 1 or not isinstance(messages[0], dict):
        raise BadCell("prompt", "not a list of one message")
    posed = as_text(messages[0].get("content"), "prompt")
    if before := _DAPO_BEFORE.match(posed):
        posed = posed[before.end() :]
    if behind := _DAPO_BEHIND.search(posed):
        posed = posed[: behind.start()]
    return as_text(posed, "prompt")


def _dapo_answer(row: Cells) -> str:
    graded = row.get("reward_model")
    if not isinstance(graded, dict):
        raise BadCell("reward_model", "missing")
    return value("ground_truth")(graded)


def _trace(read: CellReader, column: str) -> CellReader:
    """Reads a response into canonical text, and refuses one that the project's parser does."""

    def checked(row: Cells) -> str:
        response = canonical(read(row))
        if wrong := malformed(response):
            what, mark, where = wrong.partition(", behind ")
            raise BadCell(column, what, mark + where)
        return response

    return checked


_SCHEMAS = {
    schema.name: schema
    for schema in (
        Schema("openai/gsm8k", "main", "train", text("question"), _gsm8k_answer),
        Schema(
            "Parallel-R1/Parallel-GSM8K",
            None,
            "train",
            text("question"),
            value("answer"),
            response=_trace(text("response"), "response"),
        ),
        Schema("BytedTsinghua-SIA/DAPO-Math-17k", None, "train", _dapo_prompt, _dapo_answer, repeats=True),
        Schema("DigitalLearningGmbH/MATH-lighteval", None, "train", text("problem"), _boxed_solution),
        Schema("HuggingFaceH4/MATH-500", None, "test", text("problem"), value("answer")),
        Schema("HuggingFaceH4/aime_2024", None, "train", text("problem"), value("answer")),
        Schema("math-ai/aime25", None, "test", text("problem"), value("answer")),
        Schema("math-ai/amc23", None, "test", text("question", "problem"), value("answer")),
    )
}
