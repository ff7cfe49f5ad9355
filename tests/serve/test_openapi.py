"""`/openapi.json` and `/docs` describe what the server does: real bodies fit the described ones."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import pytest
from pydantic import BaseModel
from starlette.testclient import TestClient

from megatron_parallel_r1.serve.admission import Limits
from megatron_parallel_r1.serve.app import make_app
from megatron_parallel_r1.serve.openapi import OPERATIONS
from megatron_parallel_r1.serve.response_schema import (
    ChatCompletion,
    ErrorResponse,
    Health,
    ModelEntry,
    ModelList,
    Readiness,
    TextCompletion,
)
from megatron_parallel_r1.serve.served_model import ServedModel
from tests.serve.server import chat


def test_every_address_is_described(release: Path, client: httpx.Client) -> None:
    described = client.get("/openapi.json").json()
    assert described["openapi"].startswith("3.1")
    for reference in re.findall(r'"#/components/schemas/(\w+)"', json.dumps(described)):
        assert reference in described["components"]["schemas"]
    app = make_app(ServedModel.load(release), Limits())
    paths = {route.path.replace(":path", "") for route in app.routes}
    assert paths - {"/openapi.json", "/docs"} == set(described["paths"])
    fields = described["components"]["schemas"]["ChatRequest"]["properties"]
    assert fields["temperature"]["description"] and "messages" in fields


def test_the_page_loads_nothing(client: httpx.Client) -> None:
    page = client.get("/docs")
    assert page.status_code == 200 and page.headers["content-security-policy"] == "default-src 'none'"
    assert not re.search(r"<script|<link|src=|https?://", page.text)
    for operation in OPERATIONS:
        assert operation.path in page.text
    for anchor in re.findall(r'href="#(\w+)"', page.text):
        assert f'id="{anchor}"' in page.text


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/v1/models", None, ModelList),
        ("/v1/models/tiny", None, ModelEntry),
        ("/health", None, Health),
        ("/ready", None, Readiness),
        ("/v1/chat/completions", chat("w8 unknown", seed=2, logprobs=True, top_logprobs=2), ChatCompletion),
        ("/v1/chat/completions", chat("w8", max_tokens=3), ChatCompletion),
        ("/v1/completions", {"prompt": "w8", "seed": 2, "logprobs": 2, "echo": True}, TextCompletion),
        ("/v1/completions", {"prompt": "w8", "nonsense": 2}, ErrorResponse),
        ("/v1/nothing", None, ErrorResponse),
        ("/v1/chat/completions", None, ErrorResponse),
    ],
)
def test_real_bodies_are_as_described(
    client: httpx.Client, path: str, body: dict | None, expected: type[BaseModel]
) -> None:
    answer = client.get(path) if body is None else client.post(path, json=body)
    parsed = expected.model_validate(answer.json())
    assert (answer.status_code >= 400) == isinstance(parsed, ErrorResponse)


def test_the_key_is_described(narrow: httpx.Client) -> None:
    described = narrow.get("/openapi.json").json()
    assert described["paths"]["/v1/models"]["get"]["security"] == [{"key": []}]
    assert described["components"]["securitySchemes"]["key"]["scheme"] == "bearer"


def test_a_failure_of_the_server_has_the_same_shape(
    release: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Before a request is admitted, and while it is decoded: the reason is in the log alone."""

    def fail(*_: object) -> None:
        raise RuntimeError("secret")

    served = ServedModel.load(release)
    with TestClient(make_app(served, Limits(), local=False), raise_server_exceptions=False) as client:
        for target in ("app.engine_request", "session.Thinker"):
            with monkeypatch.context() as patched:
                patched.setattr(f"megatron_parallel_r1.serve.{target}", fail)
                answer = client.post("/v1/completions", json={"prompt": "w8"})
            error = ErrorResponse.model_validate(answer.json()).error
            assert (answer.status_code, error.type, error.code) == (500, "server_error", "internal_error")
            assert "secret" not in answer.text
    assert "secret" in caplog.text
    assert served.gauges == {"cache_tokens": 0}
