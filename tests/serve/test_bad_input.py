"""Whatever a client sends, it gets a 4xx in OpenAI's shape, never a 500, and the server goes on."""

from __future__ import annotations

import json
import socket
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serve.server import chat, wait_until_idle

JSON = {"Content-Type": "application/json"}
HELLO = {"role": "user", "content": "w8"}


def check(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and 0 < len(error["message"]) < 500
    return error


BODIES: list[tuple[str, bytes, int]] = [
    ("nothing", b"", 400),
    ("no JSON", b"hello", 400),
    ("half of it", b'{"messages": [', 400),
    ("no UTF-8", b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', 400),
    ("UTF-16", json.dumps(chat()).encode("utf-16"), 400),
    ("a lone surrogate", b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400),
    ("a surrogate as model", b'{"model": "\\ud800", "messages": []}', 400),
    ("a list", b"[]", 400),
    ("null", b"null", 400),
    ("NaN", b'{"temperature": NaN, "messages": [{"role": "user", "content": "w8"}]}', 400),
    ("Infinity", b'{"top_p": Infinity}', 400),
    ("1e999", b'{"temperature": 1e999, "messages": [{"role": "user", "content": "w8"}]}', 400),
    ("a number of 10,000 digits", b'{"seed": ' + b"9" * 10000 + b"}", 400),
    ("lists in lists", b"[" * 100000, 400),
    ("objects in objects", b'{"messages":' * 20000 + b"1" + b"}" * 20000, 400),
    ("deep where nobody looks", b'{"metadata":' + b"[" * 90000 + b"]" * 90000 + b"}", 400),
    ("too long", json.dumps(chat("w8 " * 200000)).encode(), 413),
    ("too many tokens", json.dumps(chat("w8 " * 5000)).encode(), 400),
]


@pytest.mark.parametrize(("body", "status"), [case[1:] for case in BODIES], ids=[case[0] for case in BODIES])
def test_bodies(client: httpx.Client, body: bytes, status: int) -> None:
    for kind in ("chat/completions", "completions"):
        if kind == "completions" and b"w8 w8" in body:
            body = body.replace(b'"messages": [{"role": "user", "content": ', b'"prompt": ').replace(
                b"}]", b""
            )
        check(client.post(f"/v1/{kind}", content=body, headers=JSON), status)


FIELDS: list[tuple[str, Any]] = [
    ("messages", None),
    ("messages", []),
    ("messages", "w8"),
    ("messages", [[]]),
    ("messages", ["w8"]),
    ("messages", [{}]),
    ("messages", [{"role": "user"}]),
    ("messages", [{"role": "user", "content": None}]),
    ("messages", [{"role": "user", "content": 5}]),
    ("messages", [{"role": "user", "content": ""}]),
    ("messages", [{"role": "user", "content": " \n"}]),
    ("messages", [{"role": "user", "content": []}]),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
    ("messages", [{"role": "tool", "content": "w8"}]),
    ("messages", [{"role": "assistant", "content": "w8"}]),
    ("messages", [{"role": "system", "content": "w8"}, HELLO]),  # this model has no chat template
    ("model", 5),
    ("stream", "yes"),
    ("stream", 1),
    ("stream_options", []),
    ("n", 0),
    ("n", -1),
    ("n", 1.5),
    ("n", True),
    ("n", 10**9),
    ("n", 10**400),
    ("n", None),
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("temperature", "1"),
    ("temperature", []),
    ("temperature", 10**400),
    ("top_p", 0),
    ("top_p", 1.01),
    ("top_k", -2),
    ("top_k", 10**30),
    ("max_tokens", 0),
    ("max_tokens", -5),
    ("max_tokens", "7"),
    ("max_tokens", 7.5),
    ("max_completion_tokens", 0),
    ("seed", 2**63),
    ("seed", -(2**63) - 1),
    ("seed", 1.5),
    ("stop", 5),
    ("stop", ""),
    ("stop", ["a", ""]),
    ("stop", ["a"] * 5),
    ("stop", "x" * 257),
    ("parallel", []),
    ("parallel", {"paths": 0}),
    ("parallel", {"paths": 9}),
    ("parallel", {"paths": "2"}),
    ("parallel", {"max_blocks": -1}),
    ("parallel", {"mode": "telepathic"}),
    ("parallel", {"width": 2}),
    ("logprobs", 2),
    ("logit_bias", {"5": 1}),
    ("frequency_penalty", 0.5),
    ("presence_penalty", [1]),
    ("response_format", {"type": "json_object"}),
    ("tools", [{"type": "function"}]),
    ("tool_choice", {"type": "function"}),
    ("best_of", 2),
    ("temprature", 1),
    ("prompt", "w8"),
    ("__proto__", {}),
    ("x" * 10000, 1),
]


@pytest.mark.parametrize(("field", "value"), FIELDS, ids=[f"{f[:20]}={v!r:.30}" for f, v in FIELDS])
def test_fields(client: httpx.Client, field: str, value: Any) -> None:
    error = check(client.post("/v1/chat/completions", json=chat() | {field: value}), 400)
    if len(field) < 80:
        assert error["param"].split(".")[0] == field or field.startswith("max_")


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        "",
        [],
        [""],
        ["w8", ""],
        [[]],
        [[8], []],
        [[8], "w8"],
        [[40]],
        [40],
        [-1],
        [2**70],
        [8, "w8"],
        [True],
        [1.5],
        {},
        8,
        ["w8"] * 17,
    ],
    ids=lambda prompt: f"{prompt!r:.20}",
)
def test_prompts(client: httpx.Client, prompt: Any) -> None:
    check(client.post("/v1/completions", json={"prompt": prompt}), 400)


def test_neutral_and_foreign_fields_do_no_harm(client: httpx.Client) -> None:
    body = chat(seed=1, max_tokens=5, user="me", metadata={"a": "b"}, frequency_penalty=0.0, logprobs=False)
    body |= {"tools": [], "response_format": {"type": "text"}, "presence_penalty": None, "stop": None}
    body["messages"] = [{"role": "user", "content": [{"type": "text", "text": "w8"}], "name": "me"}]
    assert client.post("/v1/chat/completions", json=body).status_code == 200


def test_another_model_and_other_addresses(client: httpx.Client) -> None:
    error = check(client.post("/v1/chat/completions", json=chat(model="gpt-9")), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    for path in ("/v1/embeddings", "/v1/nothing", "/redoc", "/../../etc/passwd", "/%00"):
        check(client.get(path), 404)
    check(client.get("/v1/chat/completions"), 405)
    check(client.post("/v1/models", json={}), 405)


def test_a_foreign_page_cannot_ask_in_a_browsers_name(client: httpx.Client) -> None:
    """Unasked a browser sends forms and plain text only, and shows no answer without CORS headers."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = client.post(
            "/v1/chat/completions", content=json.dumps(chat()), headers={"Content-Type": kind}
        )
        check(answer, 415)
    preflight = client.options("/v1/chat/completions", headers={"Origin": "http://evil.example"})
    assert preflight.status_code == 405
    assert not [name for name in preflight.headers if name.startswith("access-control")]


def _raw(client: httpx.Client, request: bytes) -> bytes:
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=10) as peer:
        peer.sendall(request)
        answer = b""
        while piece := peer.recv(65536):
            answer += piece
    return answer


def test_bodies_that_come_slowly_or_without_end(client: httpx.Client) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    assert b" 408 " in _raw(client, head + b"Content-Length: 100\r\n\r\n{").splitlines()[0]
    assert b" 413 " in _raw(client, head + b"Content-Length: 99999999999999999999\r\n\r\n").splitlines()[0]
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n"
    piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    assert b" 413 " in _raw(client, chunked + 5 * piece + b"0\r\n\r\n").splitlines()[0]
    with pytest.raises(ConnectionError):  # it reads no further, whoever sends on
        _raw(client, chunked + 500 * piece)
    assert b" 400 " in _raw(client, b"hello\r\n\r\n").splitlines()[0]


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = sorted({field for field, _ in FIELDS if len(field) < 80} | {"suffix", "echo", "user", "store"})


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.dictionaries(st.sampled_from(NAMES), ANYTHING, max_size=3), st.booleans())
def test_no_field_makes_it_fail(client: httpx.Client, fields: dict[str, Any], in_chat: bool) -> None:
    base = chat(max_tokens=2) if in_chat else {"prompt": "w8", "max_tokens": 2}
    body = json.dumps(base | fields).encode()
    answer = client.post(f"/v1/{'chat/' if in_chat else ''}completions", content=body, headers=JSON)
    if answer.status_code != 200:
        check(answer, answer.status_code)
        assert answer.status_code in (400, 404)


def test_afterwards_nothing_is_left(client: httpx.Client) -> None:
    assert wait_until_idle(client) == {"status": "ok", "running": 0, "waiting": 0, "cache_tokens": 0}
