"""A teacher behind an OpenAI-compatible endpoint.

Retries transient failures (429, 5xx, time-outs, lost connections, malformed bodies); any other 4xx is an
error that the user must fix.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import httpx

from megatron_parallel_r1.coldstart.settings import Api, TeacherEndpoint
from megatron_parallel_r1.coldstart.teacher import NoAnswer, TeacherAnswer, TeacherFinish, TeacherRequest
from megatron_parallel_r1.data.prompts import messages_of, render
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.servers.client import KEEPALIVE_S
from megatron_parallel_r1.utils.api_key import bearer, read_key

TRANSIENT_STATUSES = frozenset({408, 409, 425, 429})
"""Statuses below 500 that are worth a retry."""

MAX_RETRY_AFTER_S = 3600.0
"""Gives up on a server that asks for a longer wait."""

THINK, THINK_END = "<think>", "</think>"
_FINISH: dict[str | None, TeacherFinish] = {"length": "length", "content_filter": "refused"}


class BadReply(ValueError):
    """A response body without an answer; the message says why."""


class _Transient(Exception):
    """A failed attempt that is worth a retry, after `retry_after_s` seconds at the earliest."""

    def __init__(self, what: str, retry_after_s: float | None = None) -> None:
        super().__init__(what)
        self.retry_after_s = retry_after_s or 0.0


@asynccontextmanager
async def open_endpoint(endpoint: TeacherEndpoint, concurrency: int) -> AsyncIterator[EndpointTeacher]:
    """Opens the teacher and its connections.

    Raises:
        UserError: the environment variable of the key is not set, or holds no key.
    """
    key = read_key(endpoint.key_variable, where="teacher.")
    headers = bearer(key)
    connector = aiohttp.TCPConnector(
        limit=concurrency,
        keepalive_timeout=KEEPALIVE_S,
        ssl=httpx.create_ssl_context(),  # with certifi's authorities: some Pythons find none of the system
    )
    async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
        yield EndpointTeacher(endpoint, session, key)


class EndpointTeacher:
    """Sends one HTTP request per sample, with retries.

    Args:
        session: sends the key with each request.
        key: removed from the endpoint's messages before they are shown.
    """

    def __init__(
        self, endpoint: TeacherEndpoint, session: aiohttp.ClientSession, key: str | None = None
    ) -> None:
        self._endpoint = endpoint
        self._session = session
        self._key = key
        path = "chat/completions" if endpoint.api == "chat" else "completions"
        self._url = f"{endpoint.url.rstrip('/')}/{path}"
        self._proxy = _proxy_of(self._url)
        self._failures_in_a_row = 0

    @property
    def name(self) -> str:
        endpoint = self._endpoint
        return json.dumps(
            [endpoint.api, endpoint.model, endpoint.temperature, endpoint.max_tokens, endpoint.body],
            sort_keys=True,
            default=str,
        )

    async def answer(self, request: TeacherRequest) -> TeacherAnswer:
        endpoint = self._endpoint
        last_failure = ""
        for attempt in range(endpoint.retries + 1):
            try:
                answer = await self._send(request)
            except _Transient as failure:
                last_failure = str(failure)
                if attempt == endpoint.retries or failure.retry_after_s > MAX_RETRY_AFTER_S:
                    break
                wait_s = backoff_s(endpoint.backoff_s, endpoint.longest_wait_s, attempt, request.seed)
                await asyncio.sleep(max(failure.retry_after_s, wait_s))
            else:
                self._failures_in_a_row = 0
                return answer
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= endpoint.give_up_after:
            raise UserError(
                f"{self._url}: {self._failures_in_a_row} requests in a row stayed without an answer, the "
                f"last one by {last_failure}; all answers are kept, start again when the endpoint responds"
            )
        raise NoAnswer(last_failure)

    async def _send(self, request: TeacherRequest) -> TeacherAnswer:
        timeout_s = self._endpoint.timeout_s
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        body = self._body(request)
        try:
            async with self._session.post(
                self._url, json=body, timeout=timeout, proxy=self._proxy, allow_redirects=False
            ) as response:
                content = await response.read()
        except asyncio.TimeoutError:
            raise _Transient(f"no answer within {timeout_s:g} s") from None
        except aiohttp.ClientError as error:
            raise _Transient(f"{type(error).__name__} {error}".strip()) from None
        status = response.status
        if status >= 500 or status in TRANSIENT_STATUSES:
            raise _Transient(f"status {status}", retry_after_s(response.headers.get("Retry-After")))
        if not 200 <= status < 300:
            return self._handle_error(status, response.headers.get("Location"), content)
        try:
            return read_reply(content, self._endpoint.api)
        except BadReply as error:
            raise _Transient(str(error)) from None

    def _body(self, request: TeacherRequest) -> dict[str, Any]:
        endpoint = self._endpoint
        template, problem = request.template, request.problem
        prompt: dict[str, Any] = (
            {"messages": messages_of(template, problem)}
            if endpoint.api == "chat"
            else {"prompt": render(template, problem) + "\n"}
        )
        fields = {
            "model": endpoint.model,
            **prompt,
            "temperature": endpoint.temperature,
            "max_tokens": endpoint.max_tokens,
            "seed": request.seed,
            **endpoint.body,
        }
        return {name: value for name, value in fields.items() if value is not None}

    def _handle_error(self, status: int, location: str | None, content: bytes) -> TeacherAnswer:
        """Returns a refusal for a filtered prompt.

        Raises:
            UserError: any other error status.
        """
        code, message = error_of(content)
        if code == "content_filter":
            return TeacherAnswer("", "refused")
        endpoint = self._endpoint
        if status in (401, 403):
            key = (
                f"the key in {endpoint.key_variable}" if endpoint.key_variable else "a request without a key"
            )
            advice = f"it refuses {key}; set teacher.key_variable to the environment variable of a valid key"
        elif status == 404:
            advice = (
                f"it has no model {endpoint.model!r} or no such address; fix teacher.model or teacher.url"
            )
        elif 300 <= status < 400:
            advice = f"it redirects to {location}; set teacher.url to that"
        else:
            shown = message.replace(self._key, "…") if self._key else message
            advice = f"it refuses the request ({shown[:200] or 'no message'}); fix the settings of teacher"
        raise UserError(f"{self._url}: status {status}, {advice}")


def _proxy_of(url: str) -> str | None:
    """The environment's proxy for an address (HTTPS_PROXY, NO_PROXY and the like), if any.

    aiohttp's own `trust_env` also takes credentials from a netrc, and fails where there is a key too.
    """
    address, proxies = urlsplit(url), getproxies()
    if proxy_bypass(address.netloc):
        return None
    return proxies.get(address.scheme) or proxies.get("all")


def read_reply(body: bytes, api: Api) -> TeacherAnswer:
    """Reads the first choice of a response body.

    Raises:
        BadReply: the body is not JSON, or not in the format of OpenAI's API.
    """
    try:
        reply = json.loads(body)
    except (ValueError, RecursionError):
        raise BadReply(f"no JSON: {_excerpt(body)}") from None
    choices = reply.get("choices") if isinstance(reply, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        raise BadReply(f"no choices: {_excerpt(body)}")
    refused = False
    if api == "completions":
        text = choice.get("text")
    else:
        message = choice.get("message")
        if not isinstance(message, dict):
            raise BadReply(f"a choice without a message: {_excerpt(body)}")
        text = message.get("content")
        refused = bool(message.get("refusal"))
    if not isinstance(text, str | None):
        raise BadReply(f"an answer that is not text: {_excerpt(body)}")
    reason = choice.get("finish_reason")
    finish = "refused" if refused else _FINISH.get(reason if isinstance(reason, str) else None, "stop")
    return TeacherAnswer(_strip_reasoning(_valid_unicode(text or "")), finish)


def error_of(body: bytes) -> tuple[str, str]:
    """Reads (code, message) of an error body; empty where it has none."""
    try:
        reply = json.loads(body)
    except (ValueError, RecursionError):
        return "", ""
    error: Any = reply.get("error", reply) if isinstance(reply, dict) else None
    if not isinstance(error, dict):
        return "", str(error or "")
    return str(error.get("code") or ""), str(error.get("message") or error.get("detail") or "")


def backoff_s(first_s: float, longest_s: float, attempt: int, seed: int) -> float:
    """Returns the wait before retry `attempt` (0, 1, …): first_s * 2**attempt up to longest_s, with jitter.

    The jitter, a factor in [0.5, 1) fixed by `seed`, spreads requests that failed together.
    """
    wait_s = min(longest_s, first_s * 2.0 ** min(attempt, 60))
    return wait_s * random.Random(f"{seed}/{attempt}").uniform(0.5, 1.0)


def retry_after_s(header: str | None, now: datetime | None = None) -> float | None:
    """Parses a `Retry-After` header (RFC 9110, 10.2.3: seconds or a date) to seconds; None if not valid."""
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


def _strip_reasoning(text: str) -> str:
    """Returns the text after a reasoning model's thought; nothing if the thought never ends."""
    _, end, answer = text.rpartition(THINK_END)
    if end:
        return answer
    return "" if text.lstrip().startswith(THINK) else text


def _valid_unicode(text: str) -> str:
    """Replaces lone surrogates, which JSON can escape but no file can hold."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _excerpt(body: bytes) -> str:
    return repr(body[:80].decode("utf-8", errors="replace"))
