"""FakeServer: stands in for an inference server that takes a minute to start, as a program of its own.

Takes an engine's command line, heeds `--host` and `--port`, answers /health, and has a child process, which
ignores SIGTERM and is in a session of its own. With FAKE_CRASH set it says so and ends with status 1.
"""

from __future__ import annotations

import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

CHILD = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


class Health(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


def value_of(option: str) -> str:
    return sys.argv[sys.argv.index(option) + 1]


if __name__ == "__main__":
    if os.environ.get("FAKE_CRASH"):
        sys.exit("FakeServer has no weights")
    subprocess.Popen([sys.executable, "-c", CHILD], start_new_session=True)
    HTTPServer((value_of("--host"), int(value_of("--port"))), Health).serve_forever()
