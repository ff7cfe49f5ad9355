"""Requests and errors of the API: OpenAI's chat and text completions, and `parallel`."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import Self

from megatron_parallel_r1.thought.layout import Mode

# Fields of OpenAI and of other engines that have no effect on the response: they name, route or cache a
# request, or hint at an effort that a trained model does not read.
IGNORED = frozenset(
    {
        *(
            "user",
            "metadata",
            "store",
            "service_tier",
            "safety_identifier",
            "prompt_cache_key",
            "stream_options",
        ),
        *("prompt_cache_retention", "reasoning_effort", "verbosity", "request_id", "priority", "cache_salt"),
    }
)
# Fields of OpenAI, vLLM, SGLang and llama.cpp that are not supported, and the values at which they have no
# effect.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "min_p": (0, None),
    "typical_p": (1, None),
    "repetition_penalty": (1, None),
    "repeat_penalty": (1, None),
    "length_penalty": (1, None),
    "min_tokens": (0, None),
    "ignore_eos": (False, None),
    "use_beam_search": (False, None),
    "stop_token_ids": ([], None),
    "bad_words": ([], None),
    "skip_special_tokens": (True, None),
    "include_stop_str_in_output": (False, None),
    "add_generation_prompt": (True, None),
    "continue_final_message": (False, None),
    "chat_template_kwargs": ({}, None),
    "prompt_logprobs": (None,),
    "return_tokens_as_token_ids": (False, None),
    "prediction": (None,),
    "audio": (None,),
    "web_search_options": (None,),
    "frequency_penalty": (0, None),
    "presence_penalty": (0, None),
    "logit_bias": ({}, None),
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

Prompts = str | list[int] | list[str] | list[list[int]]
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

    model_config = ConfigDict(strict=True, extra="forbid", use_attribute_docstrings=True)
    neutral: ClassVar[dict[str, tuple[Any, ...]]]

    model: str | None = None
    """Name of the model, as `/v1/models` lists it."""
    stream: bool = False
    """Send the response as server-sent events while it is drawn."""
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1)
    """Responses to each prompt."""
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    """0 is greedy."""
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=-1, le=2**31)
    """0 and -1: all tokens."""
    max_tokens: int | None = Field(None, ge=0)
    """Tokens of the response, those of every path and forced tags included; 0 with `echo` alone."""
    max_completion_tokens: int | None = Field(None, ge=1)
    """The same."""
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    """The same seed gives the same response; null: another one each time."""
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    """Texts before which the main text ends."""
    parallel: ParallelOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(CompletionFields):
    """Body of `/v1/chat/completions`."""

    neutral = {"echo": (False, None)}

    messages: list[Message] = Field(min_length=1)
    """The conversation; the last message is the user's."""
    logprobs: bool | None = None
    """Return the log-prob of each token."""
    top_logprobs: int | None = Field(None, ge=0, le=20)
    """Most likely tokens that are listed in each token's place; needs `logprobs`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise field_error("top_logprobs", "needs `logprobs: true`")
        if self.max_tokens == 0:
            raise field_error("max_tokens", "must be at least 1")
        return self


class CompletionRequest(CompletionFields):
    """Body of `/v1/completions`."""

    neutral = {"top_logprobs": (None,)}

    prompt: Prompts
    """A text, several texts, token ids, or several lists of them."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | Literal[False] | None = None
    """Return the log-prob of each token, and those of this number of most likely tokens in its place."""
    echo: bool = False
    """Begin the text, and the log-probs, with the prompt."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise field_error("max_tokens", "must be at least 1, or 0 with `echo`")
        return self


def field_error(field: str, what: str) -> ApiError:
    return ApiError(400, f"{field} is wrong: {what}", field)


R = TypeVar("R", ChatRequest, CompletionRequest)


def read_request(body: bytes, kind: type[R]) -> R:
    """Parses and checks a request's body.

    Raises:
        ApiError: 400; it is not JSON, or a field is wrong, unknown or not supported.
    """
    values = _read_json(body)
    if not isinstance(values, dict):
        raise ApiError(400, "the body must be a JSON object")
    for name, neutral in (NEUTRAL | kind.neutral).items():
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
