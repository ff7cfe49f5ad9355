"""From a request to the question that the engine is asked; whatever the limits do not allow is refused."""

from __future__ import annotations

import secrets
from dataclasses import replace

from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.serve.api_error import Refused
from megatron_parallel_r1.serve.limits import Limits
from megatron_parallel_r1.serve.prompts import chat_prompt, text_prompts
from megatron_parallel_r1.serve.schema import ChatRequest, CompletionRequest
from megatron_parallel_r1.serve.served import Served
from megatron_parallel_r1.serve.session import Question
from megatron_parallel_r1.utils.seeding import hash_seed


def ask(served: Served, limits: Limits, request: ChatRequest | CompletionRequest) -> Question:
    """The question that a request poses.

    Raises:
        Refused: 404, another model is asked for; 400, the request is over a limit.
    """
    if request.model is not None and request.model != served.name:
        raise Refused(
            404,
            f"there is no model {request.model[:80]!r}; ask for {served.name!r}",
            "model",
            "model_not_found",
        )
    thinking = _thinking(served, limits, request)
    if isinstance(request, ChatRequest):
        prompts = [chat_prompt(served.tokenizer, served.template, request.messages)]
    else:
        prompts = text_prompts(served.tokenizer, served.vocabulary, request.prompt)
    longest = max(map(len, prompts))
    if longest > limits.prompt_tokens:
        raise Refused(
            400,
            f"the prompt has {longest} tokens; {limits.prompt_tokens} is the limit",
            "messages" if isinstance(request, ChatRequest) else "prompt",
            "context_length_exceeded",
        )
    if longest + thinking.max_response_tokens > served.positions:
        raise Refused(
            400,
            f"prompt ({longest} tokens) and response (max_tokens {thinking.max_response_tokens}) do not fit "
            f"into the model's {served.positions} positions; shorten one",
            "max_tokens",
            "context_length_exceeded",
        )
    count = len(prompts) * request.n
    if count > limits.choices:
        raise Refused(400, f"{count} responses are asked for; {limits.choices} is the limit", "n")
    seed = secrets.randbits(63) if request.seed is None else request.seed
    # Hashed, so that clients' small seeds give unrelated draws.
    seeds = [hash_seed(f"{seed} {index}") for index in range(count)]
    question = Question(prompts, request.n, seeds, thinking, request.stops)
    if limits.cache_tokens is not None and question.cache_tokens > limits.cache_tokens:
        raise Refused(
            400,
            f"prompts and responses may take {question.cache_tokens} tokens of the cache; "
            f"{limits.cache_tokens} is the limit; ask for fewer max_tokens or responses",
            "max_tokens",
        )
    return question


def _thinking(served: Served, limits: Limits, request: ChatRequest | CompletionRequest) -> Thinking:
    """The model's own settings with what the request changes.

    A client's `max_tokens` is a bound, never what it is owed: one above ours says no more than ours does.
    """
    own = served.thinking
    most = limits.max_tokens or own.max_response_tokens
    asked = [count for count in (request.max_tokens, request.max_completion_tokens) if count is not None]
    tokens = min(most, *asked or [own.max_response_tokens])
    changes = {
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "paths": request.parallel and request.parallel.paths,
        "max_blocks": request.parallel and request.parallel.max_blocks,
        "mode": request.parallel and request.parallel.mode,
    }
    changed = {name: value for name, value in changes.items() if value is not None}
    return replace(own, max_response_tokens=tokens, **changed)
