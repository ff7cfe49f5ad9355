"""Requests and errors of the API: OpenAI's chat and text completions, and `parallel`."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_parallel_r1.thought.layout import Mode

# OpenAI fields that have no effect on the response.
IGNORED = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "stream_options"}
)
# OpenAI fields that are not supported, and the values at which they have no effect.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0, None),
    "presence_penalty": (0, None),
    "logit_bias": ({}, None),
    "logprobs": (False, None),
    "top_logprobs": (None,),
    "echo": (False, None),
    "best_of": (1, None),
    "suffix": ("", None),
    "tools": ([], None),
    "tool_choice": ("none", "auto", None),
    "parallel_tool_calls": (True, False, None),
    "functions": ([], None),
    "function_call": (None,),
    "response_format": ({"type": "text"}, None),
    "modalities": (["text"], None),
}

Stop = Annotated[str, Field(min_length=1, max_length=256)]


class ApiError(Exception):
    """A request that fails, in the shape of OpenAI's errors.

    Attributes:
        status: HTTP status; 4xx: the request is at fault, 503: the client may retry later.
        param: the field at fault.
        code: a machine-readable reason.
        headers: sent with the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}

    @classmethod
    def internal(cls) -> ApiError:
        """500, without a reason: that is in the log."""
        return cls(500, "the server failed; its log says why", code="internal_error")

    @property
    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


class MessagePart(BaseModel):
    """A piece of a message; only text is supported."""

    model_config = ConfigDict(strict=True)
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[MessagePart]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(BaseModel):
    """What a stream ends with."""

    model_config = ConfigDict(strict=True)
    include_usage: bool = False


class ParallelOptions(BaseModel):
    """Decoding settings of this request that differ from the training's."""

    model_config = ConfigDict(strict=True, extra="forbid")
    paths: int | None = Field(None, ge=1, le=8)
    max_blocks: int | None = Field(None, ge=0, le=64)
    mode: Mode | None = None


class CompletionFields(BaseModel):
    """Fields that both kinds of completion share; None: as the model was trained."""

    model_config = ConfigDict(strict=True, extra="forbid")
    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=0, le=2**31)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    parallel: ParallelOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(CompletionFields):
    """Body of `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)


class CompletionRequest(CompletionFields):
    """Body of `/v1/completions`."""

    prompt: str | list[int] | list[str]


R = TypeVar("R", ChatRequest, CompletionRequest)


def read_request(body: bytes, kind: type[R]) -> R:
    """Parses and checks a request's body.

    Raises:
        ApiError: 400; it is not JSON, or a field is wrong, unknown or not supported.
    """
    values = _read_json(body)
    if not isinstance(values, dict):
        raise ApiError(400, "the body must be a JSON object")
    for name, neutral in NEUTRAL.items():
        if name in values and values.pop(name) not in neutral:
            raise ApiError(400, f"{name} is not supported here; leave it out", name, "unsupported_parameter")
    fields = {name: value for name, value in values.items() if name not in IGNORED - set(kind.model_fields)}
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(str(place) for place in first["loc"])[:80]
        what = "is unknown" if first["type"] == "extra_forbidden" else f"is wrong: {first['msg'][:200]}"
        raise ApiError(400, f"{field} {what}", field) from None


def _read_json(body: bytes) -> Any:
    try:
        values = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
        # A lone surrogate ("\ud800") is valid JSON but cannot be encoded as text.
        json.dumps(values, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError:
        raise ApiError(400, "the body is not valid UTF-8") from None
    except UnicodeEncodeError:
        raise ApiError(400, "a string holds a lone surrogate, which is not valid text") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {str(error)[:200]}") from None
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not allowed")
