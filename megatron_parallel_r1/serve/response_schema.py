"""Bodies of the API's responses, for its description and for the tests that hold real ones against it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ErrorDetail(_Body):
    """Why a request failed."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    """The field at fault."""
    code: str | None
    """A machine-readable reason."""


class ErrorResponse(_Body):
    """The body of every response with a status of 4xx or 5xx."""

    error: ErrorDetail


class SummaryBody(_Body):
    """What follows the paths of a block."""

    text: str
    tokens: int
    closed: bool


class ChainBody(_Body):
    """The main text, or a path: block i stands between texts i and i + 1."""

    texts: list[str]
    blocks: list[BlockBody]
    tokens: int
    closed: bool
    answer: str | None
    """The answer that its own text states, blocks left out."""


class BlockBody(_Body):
    """Paths side by side."""

    paths: list[ChainBody]
    summary: SummaryBody | None


class UsageDetails(_Body):
    """`critical_path_tokens` counts only the longest path of each block."""

    critical_path_tokens: int


class Usage(_Body):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: UsageDetails


class Alternative(_Body):
    """A token that could have been drawn."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatToken(Alternative):
    """A token of the flat text; forced ones have log-prob 0."""

    top_logprobs: list[Alternative]


class ChatLogprobs(_Body):
    content: list[ChatToken]
    refusal: None


class TextLogprobs(_Body):
    """Columns by token; with `echo` the first token has null."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class ChatMessage(_Body):
    role: Literal["assistant"]
    content: str
    """The flat response with its tags."""


class _Choice(_Body):
    index: int
    finish_reason: Literal["stop", "length"]
    parallel: ChainBody


class ChatChoice(_Choice):
    message: ChatMessage
    logprobs: ChatLogprobs | None


class TextChoice(_Choice):
    text: str
    logprobs: TextLogprobs | None


class _Completion(_Body):
    id: str
    created: int
    model: str
    usage: Usage
    warnings: list[str] = []
    """What the client should know of its request, such as words that the model does not know."""


class ChatCompletion(_Completion):
    """A response that is not streamed."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class TextCompletion(_Completion):
    """A response that is not streamed."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class ModelEntry(_Body):
    """The served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(_Body):
    object: Literal["list"]
    data: list[ModelEntry]


class Health(_Body):
    """Load of the server; all counts are 0 when it is idle."""

    status: Literal["ok"]
    running: int
    waiting: int
    cache_tokens: int
    servers: int | None = None
    servers_up: int | None = None


class Readiness(_Body):
    """503 with an error instead while the queue is full or the server drains."""

    status: Literal["ready"]
