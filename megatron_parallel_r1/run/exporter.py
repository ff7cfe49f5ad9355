"""Serves a run's metrics to Prometheus from a thread of rank zero.

A scrape reads the record of the last finished step, and asks the rollouts and servers for their state at that
moment. Training only leaves a reference here: no scrape can delay a step.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from threading import Thread
from typing import Any, Protocol

from megatron_parallel_r1.config.recipe import Recipe
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.utils.prometheus import CONTENT_TYPE, metric_lines
from megatron_parallel_r1.utils.timers import throughput

PREFIX = "parallel_r1_"


class Live(Protocol):
    """A part of a run whose state changes during a step."""

    def gauges(self) -> dict[str, float]:
        """The state now, by metric name; any thread may call it."""
        ...


class Exporter:
    """The metrics of a run; a context manager that ends the endpoint, if `serve` has started it.

    Args:
        labels: of every metric.
    """

    def __init__(self, labels: Mapping[str, str]) -> None:
        self._labels = dict(labels)
        self._last: tuple[Mapping[str, Any], float] = ({}, time.monotonic())
        self._live: tuple[Live, ...] = ()
        self._server: _Server | None = None

    @classmethod
    def of(cls, recipe: Recipe) -> Exporter:
        return cls({"run": recipe.name, "seed": str(recipe.seed)})

    def serve(self, port: int | None) -> None:
        """Answers `GET /metrics` on all interfaces until the block ends; without a port does nothing.

        Raises:
            UserError: the port cannot be used.
        """
        if port is None:
            return
        try:
            self._server = _Server(("", port), partial(_Handler, self))
        except OSError as error:
            raise UserError(
                f"metrics_port {port}: {error.strerror}; set another port, or null for no endpoint"
            ) from None
        Thread(target=self._server.serve_forever, args=(0.1,), name="metrics", daemon=True).start()

    def update(self, record: Mapping[str, Any]) -> None:
        """Shows the record of a step that has just ended, or the heading of a stage that has just begun."""
        self._last = (record, time.monotonic())

    @contextmanager
    def following(self, *parts: Live) -> Iterator[None]:
        """Shows the parts' gauges too while the block runs."""
        self._live = parts
        try:
            yield
        finally:
            self._live = ()

    def text(self) -> str:
        """All numbers of the last record, and all gauges; `NAME/SOURCE` is `NAME` with a label `source`."""
        record, ended = self._last
        values = {**record, **throughput(record), "seconds_since_step": time.monotonic() - ended}
        for part in self._live:
            values |= part.gauges()
        labels = self._labels | {"stage": str(record.get("stage", "")), "kind": str(record.get("kind", ""))}
        samples: dict[str, list[tuple[dict[str, str], float]]] = {}
        for key, value in values.items():
            if isinstance(value, int | float):
                name, _, source = key.partition("/")
                name = PREFIX + re.sub(r"\W", "_", name, flags=re.ASCII)
                own = labels | ({"source": source} if source else {})
                samples.setdefault(name, []).append((own, value))
        return "".join(line for name, same in samples.items() for line in metric_lines(name, "gauge", same))

    def __enter__(self) -> Exporter:
        return self

    def __exit__(self, *error: object) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()


class _Server(ThreadingTCPServer):
    # A port whose last connections still linger is free; one that another process listens on is not.
    allow_reuse_address = True
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of a client that went away."""


class _Handler(BaseHTTPRequestHandler):
    timeout = 10.0  # seconds; a client that sends nothing keeps no thread

    def __init__(self, exporter: Exporter, *arguments: Any) -> None:
        self._exporter = exporter
        super().__init__(*arguments)

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(404, "only /metrics is here")
            return
        body = self._exporter.text().encode()
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Logs nothing: a scrape every few seconds would fill the run's log."""
