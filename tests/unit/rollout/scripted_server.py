"""A local HTTP server whose answers a test scripts, in the place of an engine's; over real sockets."""

from __future__ import annotations

import asyncio
import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Generic, Literal, TypeVar

from megatron_parallel_r1.rollout.servers.client import AsyncHttpClient, Timeouts


@dataclass(frozen=True, slots=True)
class Answer:
    """What is sent back.

    Attributes:
        location: that of a redirect.
        fault: `silent` sends nothing until the client gives up; `cut` ends the connection half way through
            the body, `reset` before anything is sent.
    """

    body: bytes = b""
    status: int = 200
    location: str = ""
    fault: Literal["", "silent", "cut", "reset"] = ""


def as_json(content: Any, status: int = 200) -> Answer:
    return Answer(json.dumps(content).encode(), status)


Script = Callable[[str, Any], Answer]
"""Gives the answer to a request's path and its JSON body, None without one; called in a thread of its own."""


@contextmanager
def scripted_server(script: Script, key: str | None = None) -> Iterator[str]:
    """Serves on a free port; gives the address, as `http://host:port`.

    Args:
        key: the API key without which every request is answered 401.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            length = int(self.headers.get("content-length", 0))
            body = json.loads(self.rfile.read(length)) if length else None
            known = key is None or self.headers.get("authorization") == f"Bearer {key}"
            answer = script(self.path, body) if known else as_json({"error": "Unauthorized"}, 401)
            if answer.fault == "silent":
                over.wait(60)
            if answer.fault in ("silent", "reset"):
                self.close_connection = True
                return
            self.send_response(answer.status)
            self.send_header("content-length", str(len(answer.body)))
            if answer.location:
                self.send_header("location", answer.location)
            self.end_headers()
            half = answer.fault == "cut"
            self.wfile.write(answer.body[: len(answer.body) // 2] if half else answer.body)
            self.close_connection = half

        do_POST = do_GET

        def log_message(self, *_: Any) -> None: ...

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

    over = threading.Event()
    server = Server(("127.0.0.1", 0), Handler)
    serving = threading.Thread(target=server.serve_forever, args=(0.01,))
    serving.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        over.set()
        server.shutdown()
        serving.join()
        server.server_close()


Client = TypeVar("Client", bound=AsyncHttpClient)
Result = TypeVar("Result")


class FakeEngine(ABC, Generic[Client]):
    """An engine's server that answers by script.

    Attributes:
        bodies: the requests for work that it got.
        url: its address while `do` runs.
    """

    client: type[Client]

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.bodies: list[dict[str, Any]] = []
        self.url = ""

    def __call__(self, path: str, body: Any) -> Answer:
        found = self.inform(path)
        if found is None:
            self.bodies.append(body)
            found = self.answers.pop(0) if self.answers else self.handshake(body)
        return found if isinstance(found, Answer) else as_json(found)

    @abstractmethod
    def inform(self, path: str) -> Any:
        """The answer to a question about the server; None if `path` asks for work."""

    @abstractmethod
    def handshake(self, body: dict[str, Any]) -> Any:
        """Draws and scores, after the script has ended."""

    def do(self, work: Callable[[Client], Coroutine[Any, Any, Result]], timeout_s: float = 60) -> Result:
        with scripted_server(self) as self.url:
            return asyncio.run(work(self.client(self.url + "/", Timeouts(60, timeout_s, timeout_s))))
