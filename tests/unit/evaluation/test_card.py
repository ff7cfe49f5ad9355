"""Figures in a model card: of a folder, and on a stand-in for the Hub, with the real huggingface_hub."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import pytest
from huggingface_hub import ModelCard

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.evaluation.card import add_to_card, check_card
from tests.unit.evaluation.made import summary

CARD = "---\nlicense: apache-2.0\ntags: [parallel-thinking]\n---\n\n# Mine\n\nWritten by hand.\n"


def test_a_later_evaluation_replaces_its_own_figures_and_keeps_the_rest(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text(CARD)
    check_card(str(tmp_path))
    add_to_card([summary("aime24", 0.25), summary("mine", 0.5)], str(tmp_path))
    add_to_card([summary("mine", 0.75)], str(tmp_path))
    card = ModelCard.load(file)
    assert card.data.license == "apache-2.0" and card.text.lstrip().startswith("# Mine\n\nWritten by hand.")
    results = {result.dataset_name: result for result in card.data.eval_results}
    assert results["aime24"].dataset_type == "HuggingFaceH4/aime_2024"
    assert {name: result.metric_value for name, result in results.items()} == {"aime24": 25.0, "mine": 75.0}
    assert card.text.count("## Evaluated with parallel-r1") == 1 and "75.0" in card.text


def test_a_card_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no README\.md there; give a release's folder"):
        check_card(str(tmp_path))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    (tmp_path / "README.md").write_text("---\n[broken\n---\n")
    with pytest.raises(UserError, match="the model card cannot be read"):
        check_card(str(tmp_path))


class StandInHub(BaseHTTPRequestHandler):
    """Has the card of `someone/model`, and takes a commit of it."""

    commits: ClassVar[list[bytes]] = []

    def do_HEAD(self) -> None:
        self._send(CARD.encode(), body=False)

    def do_GET(self) -> None:
        self._send(CARD.encode())

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if "/preupload/" in self.path:
            files = [{"path": "README.md", "uploadMode": "regular", "shouldIgnore": False}]
            self._send(json.dumps({"files": files}).encode())
        elif "/commit/" in self.path:
            self.commits.append(content)
            url = f"http://{self.headers['Host']}/someone/model/commit/{'b' * 40}"
            self._send(json.dumps({"commitUrl": url, "commitOid": "b" * 40}).encode())
        else:
            self._send(b'{"errors": [], "warnings": []}')

    def _send(self, content: bytes, body: bool = True) -> None:
        self.send_response(200)
        for name, value in (
            *(("Content-Type", "application/json"), ("Content-Length", str(len(content)))),
            *(("ETag", '"card"'), ("X-Repo-Commit", "a" * 40)),
        ):
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


def test_a_card_on_the_hub(tmp_path: Path) -> None:
    """In a process of its own, since huggingface_hub reads its address when it is imported."""
    code = (
        "from megatron_parallel_r1.errors import UserError\n"
        "from megatron_parallel_r1.evaluation.card import add_to_card, check_card\n"
        "from tests.unit.evaluation.made import summary\n"
        "check_card('someone/model')\n"
        "add_to_card([summary('mine', 0.5)], 'someone/model')\n"
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandInHub)
    Thread(target=server.serve_forever, daemon=True).start()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path)}
    environment |= {"HF_TOKEN": "hf_test", "HF_HUB_DISABLE_XET": "1"}
    try:
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=600
        )
    finally:
        server.shutdown()
        server.server_close()
    assert result.returncode == 0, result.stderr
    (commit,) = StandInHub.commits
    header, file = (json.loads(line) for line in commit.splitlines())
    assert header["value"]["summary"] == "Add evaluation results"
    assert file["value"]["path"] == "README.md"
    written = base64.b64decode(file["value"]["content"]).decode()
    assert "license: apache-2.0" in written and "value: 50.0" in written and "Written by hand." in written
