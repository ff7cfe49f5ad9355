"""A teacher behind an OpenAI-compatible endpoint.

What may pass (429, 5xx, time-outs, lost connections, bodies that are no answer) is tried again; what will not
pass by itself (any other 4xx) is the user's to mend.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from megatron_parallel_r1.coldstart.settings import Api, Endpoint
from megatron_parallel_r1.coldstart.teacher import Answer, Finish, Request, Unanswered
from megatron_parallel_r1.data.prompts import render
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.servers.client import IDLE_S

PASSING = frozenset({408, 409, 425, 429})
"""Statuses below 500 that may be another one a while later."""


class _Passing(Exception):
    """A try failed in a way that may pass; `after_s` is the least wait that the server asks for."""

    def __init__(self, what: str, after_s: float | None = None) -> None:
        super().__init__(what)
        self.after_s = after_s


@asynccontextmanager
async def open_endpoint(endpoint: Endpoint, concurrency: int) -> AsyncIterator[EndpointTeacher]:
    """The teacher, with its connections.

    Raises:
        UserError: the variable of the key is not set, or holds no key.
    """
    key = _key(endpoint.key_variable)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(
        max_connections=concurrency, max_keepalive_connections=concurrency, keepalive_expiry=IDLE_S
    )
    async with httpx.AsyncClient(headers=headers, timeout=endpoint.timeout_s, limits=limits) as client:
        yield EndpointTeacher(endpoint, client, key)


class EndpointTeacher:
    """Sends one request a sample, and tries again.

    Args:
        client: sends the key with each request.
        key: taken out of what the endpoint says, before anybody reads it.
    """

    def __init__(self, endpoint: Endpoint, client: httpx.AsyncClient, key: str | None = None) -> None:
        self._endpoint = endpoint
        self._client = client
        self._key = key
        path = "chat/completions" if endpoint.api == "chat" else "completions"
        self._address = f"{endpoint.url.rstrip('/')}/{path}"
        self._unanswered_in_a_row = 0

    @property
    def name(self) -> str:
        told = self._endpoint
        return json.dumps(
            [told.api, told.model, told.temperature, told.max_tokens, told.body], sort_keys=True, default=str
        )

    async def answer(self, request: Request) -> Answer:
        told = self._endpoint
        tries = told.retries + 1
        last = ""
        for attempt in range(tries):
            try:
                answer = await self._once(request)
            except _Passing as failure:
                last = str(failure)
                least_s = failure.after_s or 0.0
                if attempt + 1 == tries or least_s > PATIENCE_S:
                    break
                wait_s = backoff_s(told.backoff_s, told.longest_wait_s, attempt, request.seed)
                await asyncio.sleep(max(least_s, wait_s))
            else:
                self._unanswered_in_a_row = 0
                return answer
        self._unanswered_in_a_row += 1
        if self._unanswered_in_a_row >= told.give_up_after:
            raise UserError(
                f"{self._address}: {self._unanswered_in_a_row} requests in a row stayed without an answer, "
                f"the last one by {last}; what was answered is kept, start again when the endpoint answers"
            )
        raise Unanswered(last)

    async def _once(self, request: Request) -> Answer:
        timeout_s = self._endpoint.timeout_s
        try:
            # httpx counts from byte to byte: a server that drips would hold the request for ever.
            sending = self._client.post(self._address, json=self._body(request))
            response = await asyncio.wait_for(sending, timeout_s)
        except (asyncio.TimeoutError, httpx.TimeoutException):
            raise _Passing(f"no answer within {timeout_s:g} s") from None
        except httpx.RequestError as error:
            raise _Passing(f"{type(error).__name__} {error}".strip()) from None
        status = response.status_code
        if status >= 500 or status in PASSING:
            raise _Passing(f"status {status}", retry_after_s(response.headers.get("Retry-After")))
        if not response.is_success:
            return self._refused(response)
        try:
            return read_reply(response.content, self._endpoint.api)
        except BadReply as error:
            raise _Passing(str(error)) from None

    def _body(self, request: Request) -> dict[str, Any]:
        told = self._endpoint
        text = render(request.template, request.problem.prompt)
        asked = (
            {"messages": [{"role": "user", "content": text}]}
            if told.api == "chat"
            else {"prompt": text + "\n"}
        )
        fields = {
            "model": told.model,
            **asked,
            "temperature": told.temperature,
            "max_tokens": told.max_tokens,
            "seed": request.seed,
            **told.body,
        }
        return {name: value for name, value in fields.items() if value is not None}

    def _refused(self, response: httpx.Response) -> Answer:
        """The answer that a filtered prompt gets.

        Raises:
            UserError: any other status that will not pass by itself.
        """
        code, message = error_of(response.content)
        if code == "content_filter":
            return Answer("", "refused")
        told, status = self._endpoint, response.status_code
        if status in (401, 403):
            key = f"the key in {told.key_variable}" if told.key_variable else "a request without a key"
            advice = (
                f"it refuses {key}; set teacher.key_variable to the environment variable of a key it takes"
            )
        elif status == 404:
            advice = f"it knows no model {told.model!r} or no such address; mend teacher.model or teacher.url"
        elif response.is_redirect:
            advice = f"it redirects to {response.headers.get('Location')}; give that as teacher.url"
        else:
            said = message.replace(self._key, "…") if self._key else message
            advice = (
                f"it refuses the request ({said[:200] or 'without a word'}); mend the settings of teacher"
            )
        raise UserError(f"{self._address}: status {status}, {advice}")


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(f"teacher.key_variable: {variable} is not set in the environment; set it to the key")
    if not (key.isascii() and key.isprintable()):
        raise UserError(
            f"teacher.key_variable: what {variable} holds is no key; it has characters that no key has"
        )
    return key


THINK, THINK_END = "<think>", "</think>"
_FINISH: dict[str | None, Finish] = {"length": "length", "content_filter": "refused"}


class BadReply(ValueError):
    """A body that holds no answer, and why."""


def read_reply(body: bytes, api: Api) -> Answer:
    """The first choice of a reply.

    Raises:
        BadReply: the body is no JSON, or not of the shape that OpenAI's API has.
    """
    try:
        reply = json.loads(body)
    except (ValueError, RecursionError):
        raise BadReply(f"no JSON: {_shown(body)}") from None
    choices = reply.get("choices") if isinstance(reply, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        raise BadReply(f"no choices: {_shown(body)}")
    refused = False
    if api == "completions":
        text = choice.get("text")
    else:
        message = choice.get("message")
        if not isinstance(message, dict):
            raise BadReply(f"a choice without a message: {_shown(body)}")
        text = message.get("content")
        refused = bool(message.get("refusal"))
    if not isinstance(text, str | None):
        raise BadReply(f"an answer that is no text: {_shown(body)}")
    reason = choice.get("finish_reason")
    finish = "refused" if refused else _FINISH.get(reason if isinstance(reason, str) else None, "stop")
    return Answer(_without_thought(_unicode(text or "")), finish)


def error_of(body: bytes) -> tuple[str, str]:
    """(code, message) of a reply that says what is wrong; empty where it does not."""
    try:
        reply = json.loads(body)
    except (ValueError, RecursionError):
        return "", ""
    error: Any = reply.get("error", reply) if isinstance(reply, dict) else None
    if not isinstance(error, dict):
        return "", str(error or "")
    return str(error.get("code") or ""), str(error.get("message") or error.get("detail") or "")


def _without_thought(text: str) -> str:
    """What follows the thought of a reasoning model; nothing, if the thought never ends."""
    _, end, answer = text.rpartition(THINK_END)
    if end:
        return answer
    return "" if text.lstrip().startswith(THINK) else text


def _unicode(text: str) -> str:
    """JSON can spell half of a surrogate pair, which no file can hold."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _shown(body: bytes) -> str:
    return repr(body[:80].decode("utf-8", errors="replace"))


PATIENCE_S = 3600.0
"""A server that wants a longer pause is not waited for."""


def backoff_s(first_s: float, longest_s: float, attempt: int, seed: int) -> float:
    """The wait before retry `attempt` (0, 1, …): half to all of first_s * 2**attempt, at most longest_s.

    The half that is left to chance keeps requests apart that failed together; `seed` fixes it.
    """
    whole = min(longest_s, first_s * 2.0 ** min(attempt, 60))
    return whole * random.Random(f"{seed}/{attempt}").uniform(0.5, 1.0)


def retry_after_s(header: str | None, now: datetime | None = None) -> float | None:
    """Seconds that a `Retry-After` header asks for (RFC 9110, 10.2.3: seconds or a date); None without one.

    A header that is neither is none.
    """
    if header is None:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        date = parsedate_to_datetime(header)
    except ValueError:
        return None
    date = date if date.tzinfo else date.replace(tzinfo=timezone.utc)
    return max(0.0, (date - (now or datetime.now(timezone.utc))).total_seconds())
