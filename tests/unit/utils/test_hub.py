"""`parallel-r1 download` with the real huggingface_hub, against a stand-in for the Hub on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.utils.hub import download, is_hub_name, local_folder, missing_folder

COMMIT = "a" * 40
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"the same weights",
    "original/consolidated.00.pth": b"the same weights",
}


class StandInHub(BaseHTTPRequestHandler):
    """Answers for `someone/model` as huggingface.co does, and for no other model."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        if path in ("/api/models/someone/model/revision/main", "/api/models/someone/model/revision/v1"):
            siblings = [{"rfilename": name} for name in FILES]
            self._send(
                200, json.dumps({"id": "someone/model", "sha": COMMIT, "siblings": siblings}).encode(), body
            )
        elif path.startswith(f"/api/models/someone/model/tree/{COMMIT}"):
            sizes = [(name, len(content)) for name, content in FILES.items()]
            entries = [{"type": "file", "path": name, "size": size, "oid": "0" * 40} for name, size in sizes]
            self._send(200, json.dumps(entries).encode(), body)
        elif (name := path.removeprefix(f"/someone/model/resolve/{COMMIT}/")) in FILES:
            self._send(200, FILES[name], body)
        else:
            self._send(404, b"{}", body)

    def _send(self, status: int, content: bytes, body: bool) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def stand_in() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandInHub)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def run(code: str, endpoint: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """Runs Python in a process of its own, since huggingface_hub reads its address when it is imported."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


def test_a_model_is_downloaded_once_and_then_found_by_name(tmp_path: Path) -> None:
    code = (
        "from megatron_parallel_r1.utils.hub import download, local_folder\n"
        "from megatron_parallel_r1.config.model import ModelSource\n"
        "from megatron_parallel_r1.errors import UserError\n"
        "folder = download('someone/model')\n"
        "assert local_folder('someone/model') == folder == ModelSource(path='someone/model').folder\n"
        "assert download('someone/model@v1') == local_folder('someone/model@v1') == folder\n"
        "print(*sorted(file.name for file in folder.rglob('*') if file.is_file()))\n"
        "try:\n"
        "    download('someone/other')\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    with stand_in() as endpoint:
        result = run(code, endpoint, tmp_path)
    assert result.returncode == 0, result.stderr
    files, refusal = result.stdout.splitlines()
    assert files == "config.json model.safetensors"
    assert refusal.startswith("someone/other: cannot download it from the Hugging Face Hub (")
    offline = "from megatron_parallel_r1.utils.hub import local_folder; print(local_folder('someone/model'))"
    assert COMMIT in run(offline, "http://127.0.0.1:9", tmp_path).stdout


def test_what_is_a_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("someone/model") and is_hub_name("someone/model.v2@refs/pr/1")
    for other in ("model", "/someone/model", "../model", "runs/a/b", "someone/"):
        assert not is_hub_name(other) and local_folder(other) == Path(other)
    assert "parallel-r1 download someone/model" in missing_folder("someone/model")
    (tmp_path / "someone/model").mkdir(parents=True)
    assert not is_hub_name("someone/model")
    with pytest.raises(UserError, match="not a name on the Hub"):
        download("model")
