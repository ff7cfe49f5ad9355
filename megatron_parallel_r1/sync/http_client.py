"""One HTTP exchange with a server, and the words for what goes wrong in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import httpx

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.servers.client import IDLE_S, Unreachable

# A step may take `timeout_s`; what the server says when it did not end comes later.
GRACE_S = 30.0
QUICK_S = 20.0


class Wire:
    """JSON to and from one server; several threads may use it.

    Args:
        url: base address.
        timeout_s: how long an answer may take, but of `quick` questions, which need no work.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        # A proxy of the environment is for the world outside, not for servers of the cluster.
        limits = httpx.Limits(keepalive_expiry=IDLE_S)
        self._client = httpx.Client(base_url=self.url, limits=limits, trust_env=False)

    def post(self, path: str, body: Mapping[str, Any] | None = None, quick: bool = False) -> Any:
        """The answer's JSON, or its text if it is none."""
        return self._ask("POST", path, body or {}, quick)

    def get(self, path: str, quick: bool = False) -> Any:
        return self._ask("GET", path, None, quick)

    def close(self) -> None:
        self._client.close()

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None, quick: bool) -> Any:
        timeout = httpx.Timeout(QUICK_S if quick else self.timeout_s + GRACE_S, connect=QUICK_S)
        try:
            reply = self._client.request(method, path, json=body, timeout=timeout)
        except httpx.HTTPError as error:
            raise Unreachable(f"{self.url}{path}: {error or type(error).__name__}") from error
        if reply.status_code >= 500:
            # What broke inside may work on another server, or after a restart.
            raise Unreachable(f"{self.url}{path}: {reply.status_code} {_said(reply)}")
        if reply.status_code >= 400:
            raise UserError(f"{self.url}{path} refused: {_said(reply)}")
        try:
            return reply.json()
        except json.JSONDecodeError:
            return reply.text


def _said(reply: httpx.Response) -> str:
    """An error's text in one line."""
    try:
        told = reply.json()
    except json.JSONDecodeError:
        told = reply.text
    if isinstance(told, dict):
        told = told.get("message") or told.get("error") or told.get("detail") or told
    if isinstance(told, dict):
        told = told.get("message") or told
    return " ".join(str(told).split())[:300]
