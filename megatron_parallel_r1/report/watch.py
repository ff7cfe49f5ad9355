"""`parallel-r1 report --watch`: serves the page of runs that still go on, to browsers of this machine."""

from __future__ import annotations

import html
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.report.html import render_report
from megatron_parallel_r1.report.run_folder import STAGE_FILES

WATCHED = (*STAGE_FILES, "stages.json", "eval.jsonl", "config.yaml", "data.md")
HOST = "127.0.0.1"


def serve_report(folders: Sequence[Path], port: int = 0) -> None:
    """Serves the page until Ctrl-C; prints its address.

    Raises:
        UserError: a folder does not exist, or the port is not available.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such run folder; give the folder that holds the run's stages")
    with make_server(folders, port) as server:
        names = ", ".join(folder.resolve().name for folder in folders)
        print(f"{names}: http://{HOST}:{server.server_port} follows the run; Ctrl-C ends it", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def make_server(folders: Sequence[Path], port: int) -> ThreadingHTTPServer:
    """A server that listens already.

    Raises:
        UserError: the port is not available.
    """
    page = _WatchedPage(tuple(folders))

    class WatchedHandler(_ReportHandler):
        watched = page

    try:
        return _ReportServer((HOST, port), WatchedHandler)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"report: cannot listen at port {port} ({reason}); choose another --port") from None


class _ReportServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that has gone away is no error."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


@dataclass(slots=True)
class _WatchedPage:
    """The page of `folders`, built again when one of their files has changed."""

    folders: tuple[Path, ...]
    _built: tuple[str, bytes] = ("", b"")
    _lock: Lock = field(default_factory=Lock)

    def version(self) -> str:
        files = sorted(file for each in self.folders for name in WATCHED for file in each.glob(name))
        stamps = [(str(file), (stat := file.stat()).st_mtime_ns, stat.st_size) for file in files]
        return f'"{sha256(repr(stamps).encode()).hexdigest()[:16]}"'

    def content(self) -> tuple[str, bytes]:
        """Version and page.

        Raises:
            UserError: a folder holds no run yet, or one of its files is malformed.
        """
        with self._lock:
            version = self.version()
            if version != self._built[0]:
                self._built = version, render_report(self.folders, watched=True)
            return self._built


class _ReportHandler(BaseHTTPRequestHandler):
    watched: _WatchedPage

    def do_GET(self) -> None:
        host = self.headers.get("Host", "").rpartition(":")[0]
        if host not in (HOST, "localhost"):  # a page of another origin, by DNS rebinding
            self._send(HTTPStatus.FORBIDDEN, b"this server accepts requests to localhost only")
        elif self.path.partition("?")[0] != "/":
            self._send(HTTPStatus.NOT_FOUND, b"there is only /")
        else:
            self._send_page()

    def _send_page(self) -> None:
        known = self.headers.get("If-None-Match")
        try:
            if known is not None and known == self.watched.version():
                self._send(HTTPStatus.NOT_MODIFIED, b"")
                return
            version, page = self.watched.content()
        except (UserError, OSError) as error:  # the run replaces its files
            text = html.escape(str(error))
            if known is None and "text/html" in self.headers.get("Accept", ""):
                text = f'<meta http-equiv="refresh" content="3"><p>waiting: {text}</p>'
            self._send(HTTPStatus.SERVICE_UNAVAILABLE, text.encode())
        else:
            self._send(HTTPStatus.OK, page, version)

    def _send(self, status: HTTPStatus, body: bytes, version: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        if version is not None:
            self.send_header("ETag", version)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Prints nothing: a page asks every few seconds."""
