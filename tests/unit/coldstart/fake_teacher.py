"""A local HTTP server in the place of a teacher, which no test machine has. It speaks OpenAI's API over real
sockets, and misbehaves as it is told."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Reply:
    """What is sent back.

    Attributes:
        delay_s: before anything is sent.
        cut: the body stops half way and the connection ends.
        drip_s: pause between two bytes of the body, 0 for none.
    """

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    cut: bool = False
    drip_s: float = 0.0


def chat(text: str | None, finish: str = "stop", refusal: str | None = None) -> Reply:
    message = {"role": "assistant", "content": text, "refusal": refusal}
    return Reply(json.dumps({"choices": [{"message": message, "finish_reason": finish}]}).encode())


def completion(text: str, finish: str = "stop") -> Reply:
    return Reply(json.dumps({"choices": [{"text": text, "finish_reason": finish}]}).encode())


def fault(status: int, message: str = "", code: str = "", **headers: str) -> Reply:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(json.dumps({"error": {"message": message, "code": code}}).encode(), status, named)


class FakeTeacher:
    """Answers with `behave(body, try)`, where `try` counts equal requests from 0.

    Attributes:
        requests: (path, headers, body) of each request, in the order of arrival.
        busiest: requests that were under way together at most.
    """

    def __init__(self, behave: Callable[[Body, int], Reply]) -> None:
        self.requests: list[tuple[str, dict[str, str], Body]] = []
        self.busiest = 0
        self._behave = behave
        self._tries: Counter[str] = Counter()
        self._under_way = 0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    @contextmanager
    def running(self) -> Iterator[FakeTeacher]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def _take(self, path: str, headers: dict[str, str], body: Body) -> Reply:
        with self._lock:
            self._under_way += 1
            self.busiest = max(self.busiest, self._under_way)
            self.requests.append((path, headers, body))
            name = json.dumps(body, sort_keys=True)
            tried = self._tries[name]
            self._tries[name] += 1
        return self._behave(body, tried)

    def _done(self) -> None:
        with self._lock:
            self._under_way -= 1

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        teacher = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                try:
                    reply = teacher._take(self.path, dict(self.headers), body)
                    time.sleep(reply.delay_s)
                    self._send(reply)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True  # the other side was killed, or has lost patience
                finally:
                    teacher._done()

            def _send(self, reply: Reply) -> None:
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(reply.body)))
                self.end_headers()
                if reply.cut:
                    self.wfile.write(reply.body[: len(reply.body) // 2])
                    self.wfile.flush()
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                elif reply.drip_s:
                    for byte in reply.body:
                        self.wfile.write(bytes([byte]))
                        self.wfile.flush()
                        time.sleep(reply.drip_s)
                else:
                    self.wfile.write(reply.body)

            def log_message(self, format: str, *args: object) -> None:
                """Says nothing."""

        return Handler
