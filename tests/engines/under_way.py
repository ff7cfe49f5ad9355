"""A request that is under way when weights are published."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx

from megatron_parallel_r1.sync.settings import InFlightPolicy

# Tokens of it: more than a server draws before a publication meets it.
LONG = 900


class Asked:
    """For a control (sync/control.py), to be named before it: it is asked for a long text just before it is
    paused, and has begun it then. Whose path and question they are, the subclass says."""

    url: str

    def __init__(self, url: str) -> None:
        super().__init__(url, 120)
        self.answers: list[dict[str, Any]] = []
        self._begun = threading.Event()
        self.request = threading.Thread(target=self._ask)

    def pause(self, in_flight: InFlightPolicy) -> None:
        self.request.start()
        assert self._begun.wait(120), "the request did not begin"
        super().pause(in_flight)

    def _ask(self) -> None:
        path, body = self.question()
        with httpx.stream("POST", f"{self.url}{path}", json={**body, "stream": True}, timeout=300) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    self.answers.append(json.loads(line.removeprefix("data: ")))
                    self._begun.set()
