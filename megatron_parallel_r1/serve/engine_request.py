"""Turns an API request into prompts, seeds and settings for the engine, and checks it against the limits."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from megatron_parallel_r1.data.prompts import encode_text, render
from megatron_parallel_r1.errors import one_line
from megatron_parallel_r1.rollout.engine import ScoresTokens
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.serve.admission import Limits
from megatron_parallel_r1.serve.schema import ApiError, ChatRequest, CompletionRequest, Message, Prompts
from megatron_parallel_r1.serve.served_model import ServedModel, cuts_distribution
from megatron_parallel_r1.utils.seeding import hash_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Unknown words that a warning names.
SHOWN_WORDS = 10


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A request in token ids. Response i continues `prompts[i // n]` and is drawn with `seeds[i]`.

    Attributes:
        alternatives: to each token, listed with its log-prob; None: no log-probs are returned.
        echo: whether a response begins with its prompt.
        draws: whether anything is drawn, or prompts are only read.
        warnings: what the client should know of its request.
    """

    prompts: list[list[int]]
    n: int
    seeds: list[int]
    thinking: Thinking
    stops: tuple[str, ...] = ()
    alternatives: int | None = None
    echo: bool = False
    draws: bool = True
    warnings: tuple[str, ...] = ()

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def cache_tokens(self) -> int:
        """The most KV cache tokens that its responses may hold.

        Prompts count once, and each token of a response once; in mode replay twice, because paths are written
        again after the first one before they are freed.
        """
        copies = 2 if self.thinking.mode == "replay" else 1
        return self.prompt_tokens + copies * len(self.seeds) * self.thinking.max_response_tokens


def engine_request(
    served: ServedModel, limits: Limits, request: ChatRequest | CompletionRequest
) -> EngineRequest:
    """Tokenizes and checks a request.

    Raises:
        ApiError: 404, it names another model; 400, it is over a limit.
    """
    if request.model is not None and request.model != served.name:
        raise ApiError(
            404,
            f"there is no model {request.model[:80]!r}; use {served.name!r}",
            "model",
            "model_not_found",
        )
    thinking = _thinking(served, limits, request)
    _check_engine(served, request, thinking)
    if isinstance(request, ChatRequest):
        prompts = [chat_prompt(served.tokenizer, served.template, request.messages)]
        texts = [message.text for message in request.messages]
        alternatives = request.top_logprobs or 0 if request.logprobs else None
    else:
        prompts = text_prompts(served.tokenizer, served.vocabulary, request.prompt)
        written = [request.prompt] if isinstance(request.prompt, str) else request.prompt
        texts = [text for text in written if isinstance(text, str)]
        alternatives = None if request.logprobs is False else request.logprobs
    longest = max(map(len, prompts))
    if longest > limits.prompt_tokens:
        raise ApiError(
            400,
            f"the prompt has {longest} tokens; {limits.prompt_tokens} is the limit",
            "messages" if isinstance(request, ChatRequest) else "prompt",
            "context_length_exceeded",
        )
    if longest + thinking.max_response_tokens > served.positions:
        raise ApiError(
            400,
            f"prompt ({longest} tokens) and response (max_tokens {thinking.max_response_tokens}) do not fit "
            f"into the model's {served.positions} positions; shorten one",
            "max_tokens",
            "context_length_exceeded",
        )
    count = len(prompts) * request.n
    if count > limits.choices:
        raise ApiError(400, f"the request needs {count} responses; {limits.choices} is the limit", "n")
    seed = secrets.randbits(63) if request.seed is None else request.seed
    # Hashed, so that the small seeds of clients do not give neighbouring draws.
    seeds = [hash_seed(f"{seed} {index}") for index in range(count)]
    built = EngineRequest(
        prompts,
        request.n,
        seeds,
        thinking,
        request.stops,
        alternatives,
        echo=isinstance(request, CompletionRequest) and request.echo,
        draws=request.max_tokens != 0,
        warnings=unknown_words(served.tokenizer, texts),
    )
    if limits.cache_tokens is not None and built.cache_tokens > limits.cache_tokens:
        raise ApiError(
            400,
            f"prompts and responses may take {built.cache_tokens} tokens of the KV cache; "
            f"{limits.cache_tokens} is the limit; lower max_tokens or n",
            "max_tokens",
        )
    return built


def _check_engine(served: ServedModel, request: ChatRequest | CompletionRequest, thinking: Thinking) -> None:
    """Raises:
    ApiError: 400; the request needs what rollout servers cannot do.
    """
    what = None
    if thinking.mode not in served.engine.modes:
        what = ("parallel.mode", f"servers are exact in {', '.join(sorted(served.engine.modes))}")
    elif served.engine_name == "vllm" and cuts_distribution(thinking):
        what = ("top_p" if thinking.top_p < 1 else "top_k", "vLLM servers draw from all tokens only")
    elif not isinstance(served.engine, ScoresTokens):
        scores = "servers give the log-probs of drawn tokens alone"
        if isinstance(request, ChatRequest):
            what = ("top_logprobs", scores) if request.top_logprobs else None
        elif request.logprobs:
            what = ("logprobs", f"{scores}; give 0")
        elif request.echo and request.logprobs is not None:
            what = ("echo", scores)
    if what is not None:
        field, reason = what
        raise ApiError(
            400, f"{field}: the model is on rollout servers; {reason}", field, "unsupported_parameter"
        )


def chat_prompt(tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[Message]) -> list[int]:
    """The conversation; its last message goes into the prompt template of the training.

    Raises:
        ApiError: 400; it does not end in a user's message, or it has more and the model has no chat template.
    """
    *before, last = messages
    if last.role != "user":
        raise ApiError(400, "the last message must be the user's", "messages")
    if not last.text.strip():
        raise ApiError(400, "the last message is empty", "messages")
    problem = render(template, last.text)
    if tokenizer.chat_template is None:
        if before:
            raise ApiError(400, "this model has no chat template: send a single user message", "messages")
        return encode_text(tokenizer, problem + "\n")
    turns = [{"role": message.role, "content": message.text} for message in before]
    turns.append({"role": "user", "content": problem})
    try:
        # `tokenize=False` returns a text.
        chat = cast(str, tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
    except Exception as error:  # whatever a template raises
        raise ApiError(
            400, f"the model's chat template rejects the conversation: {one_line(error)}", "messages"
        ) from None
    return tokenizer.encode(chat, add_special_tokens=False)


def unknown_words(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> tuple[str, ...]:
    """A warning that names the words which the model reads as its unknown token; none if there are none."""
    unknown, words = tokenizer.unk_token_id, dict[str, None]()
    if unknown is None or not tokenizer.is_fast:
        return ()
    for text in texts:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        words |= dict.fromkeys(text[begin:end] for token, (begin, end) in pairs if token == unknown)
    words.pop(str(tokenizer.unk_token), None)
    if not words:
        return ()
    shown = ", ".join(repr(word[:40]) for word in list(words)[:SHOWN_WORDS])
    more = f" and {len(words) - SHOWN_WORDS} more" if len(words) > SHOWN_WORDS else ""
    return (f"the model does not know {shown}{more}; it reads {tokenizer.unk_token} instead",)


def text_prompts(tokenizer: PreTrainedTokenizerBase, vocabulary: int, prompt: Prompts) -> list[list[int]]:
    """The prompts of a text completion, without any template; BOS first where the tokenizer adds it.

    Raises:
        ApiError: 400; there is no prompt, one is empty, or a token id is out of range.
    """
    if isinstance(prompt, str):
        prompts = [encode_text(tokenizer, prompt)] if prompt else []
    elif any(isinstance(item, list) for item in prompt):
        prompts = [item for item in prompt if isinstance(item, list)]
    elif any(isinstance(item, int) for item in prompt):
        prompts = [[item for item in prompt if isinstance(item, int)]]
    else:
        prompts = [encode_text(tokenizer, str(item)) if item else [] for item in prompt]
    if not prompts or not all(prompts):
        raise ApiError(400, "the prompt is empty", "prompt")
    if any(not 0 <= token < vocabulary for tokens in prompts for token in tokens):
        raise ApiError(400, f"a token id is outside 0..{vocabulary - 1}", "prompt")
    return prompts


def _thinking(served: ServedModel, limits: Limits, request: ChatRequest | CompletionRequest) -> Thinking:
    """The model's settings with the request's changes; a `max_tokens` above the limit means the limit."""
    stored = served.thinking
    if request.parallel and request.parallel.paths is not None and served.tags.plan_end is not None:
        what = f"the model's format {served.tags.format.name} reads the number of paths from its plans"
        raise ApiError(400, f"{what}; leave paths out", "parallel.paths")
    limit = limits.max_tokens or stored.max_response_tokens
    wanted = [count for count in (request.max_tokens, request.max_completion_tokens) if count is not None]
    tokens = max(1, min(limit, *wanted or [stored.max_response_tokens]))
    changes = {
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k and max(0, request.top_k),
        "paths": request.parallel and request.parallel.paths,
        "max_blocks": request.parallel and request.parallel.max_blocks,
        "mode": request.parallel and request.parallel.mode,
    }
    changed = {name: value for name, value in changes.items() if value is not None}
    return stored.replace(max_response_tokens=tokens, **changed)
