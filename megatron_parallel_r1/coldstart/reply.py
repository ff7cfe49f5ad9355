"""The body of an endpoint's reply, read into an answer."""

from __future__ import annotations

import json
from typing import Any

from megatron_parallel_r1.coldstart.settings import Api
from megatron_parallel_r1.coldstart.teacher import Answer, Finish

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
